import hashlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from grounding.convert.dicom import dicom_rtstruct, dicom_seg, fill
from grounding.convert.record import AnnotationError
from tests.grounding.convert.builders import collect_with_reasons, decoded, label

SIZE = (25, 31)  # rows, columns; odd, so that the frames of a bit mask do not start at whole bytes
SPACING = (1.3, 0.7)  # between rows, between columns
AXIAL = ([1.0, 0, 0], [0, 1.0, 0])
TILT = np.deg2rad(25)
OBLIQUE = ([np.cos(TILT), np.sin(TILT), 0], [-np.sin(TILT) * 0.8, np.cos(TILT) * 0.8, 0.6])
CT, SEG, RTSTRUCT = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "66.4", "481.3"))
FRAME = generate_uid()


def code(meaning):
    item = Dataset()
    item.CodeMeaning = meaning
    return Sequence([item])


def items(**values):
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return Sequence([item])


def write(dataset, path, sop_class, uid):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.save_as(path, enforce_file_format=True)


class Images:
    """A series on disk: image k lies k * 2 mm along the normal; names run against the order in space."""

    def __init__(self, folder, count=4, axes=AXIAL, modality="CT", suffix=".dcm", patient="Doe^Jane 1970"):
        self.axes, self.series, self.uids, self.paths = axes, generate_uid(), [], []
        self.normal = np.cross(*axes)
        self.origin = np.array([-12.5, 7.25, 100.0])
        for k in range(count):
            image = Dataset()
            image.Modality, image.PatientID, image.FrameOfReferenceUID = modality, patient, FRAME
            image.SeriesInstanceUID, image.StudyInstanceUID = self.series, generate_uid()
            image.Rows, image.Columns = SIZE
            image.ImagePositionPatient, image.ImageOrientationPatient = list(self.position(k)), [*axes[0], *axes[1]]
            image.PixelSpacing, image.InstanceNumber = list(SPACING), count - k
            image.SamplesPerPixel, image.PhotometricInterpretation, image.PixelRepresentation = 1, "MONOCHROME2", 1
            image.BitsAllocated = image.BitsStored = 16
            image.HighBit, image.RescaleSlope, image.RescaleIntercept = 15, 1, 0
            image.PixelData = np.full(SIZE, 100 * k, "<i2").tobytes()
            self.uids.append(generate_uid())
            self.paths.append(folder / f"{count - k:03d}{suffix}")
            write(image, self.paths[-1], CT, self.uids[-1])

    def position(self, k):
        return self.origin + 2 * k * self.normal

    def points(self, k, xy):
        """Patient coordinates of pixels (x, y) of image k: PS3.3 equation C.7.6.2.1-1, written out."""
        row, column = (np.array(axis) for axis in self.axes)
        return [self.position(k) + row * SPACING[1] * x + column * SPACING[0] * y for x, y in xy]


def save_seg(path, images, frames, segments, kind="BINARY", frame_of_reference=FRAME, derived=True, **changes):
    """`frames`: (segment, image, mask). `segments`: (label, type, side)."""
    seg = Dataset()
    seg.Modality, seg.SeriesInstanceUID, seg.FrameOfReferenceUID = "SEG", generate_uid(), frame_of_reference
    seg.SegmentationType, seg.Rows, seg.Columns, seg.NumberOfFrames = kind, *frames[0][2].shape, len(frames)
    seg.SamplesPerPixel, seg.PhotometricInterpretation, seg.PixelRepresentation = 1, "MONOCHROME2", 0
    seg.BitsAllocated = seg.BitsStored = 1
    seg.HighBit = 0
    seg.SegmentSequence = Sequence()
    for number, (name, type_, side) in enumerate(segments, 1):
        segment = items(SegmentNumber=number, SegmentLabel=name, SegmentedPropertyTypeCodeSequence=code(type_))[0]
        if side:
            segment.SegmentedPropertyTypeModifierCodeSequence = code(side)
        seg.SegmentSequence.append(segment)
    seg.SharedFunctionalGroupsSequence = items(
        PlaneOrientationSequence=items(ImageOrientationPatient=[*images.axes[0], *images.axes[1]])
    )
    seg.PerFrameFunctionalGroupsSequence = Sequence()
    for number, k, _ in frames:
        group = items(
            SegmentIdentificationSequence=items(ReferencedSegmentNumber=number),
            PlanePositionSequence=items(ImagePositionPatient=list(images.position(k))),
        )[0]
        if derived:
            source = items(ReferencedSOPClassUID=CT, ReferencedSOPInstanceUID=images.uids[k])
            group.DerivationImageSequence = items(SourceImageSequence=source)
        seg.PerFrameFunctionalGroupsSequence.append(group)
    seg.ReferencedSeriesSequence = items(SeriesInstanceUID=images.series)
    bits = np.packbits(np.concatenate([mask.reshape(-1) for *_, mask in frames]), bitorder="little").tobytes()
    seg.PixelData = bits + b"\0" * (len(bits) % 2)
    for keyword, value in changes.items():
        setattr(seg, keyword, value)
    write(seg, path, SEG, generate_uid())


def save_rtstruct(path, images, structures, frame_of_reference=FRAME):
    """`structures`: (name, [(image or None, points, type)])."""
    plan = Dataset()
    plan.Modality, plan.SeriesInstanceUID = "RTSTRUCT", generate_uid()
    plan.ReferencedFrameOfReferenceSequence = items(
        FrameOfReferenceUID=frame_of_reference,
        RTReferencedStudySequence=items(RTReferencedSeriesSequence=items(SeriesInstanceUID=images.series)),
    )
    plan.StructureSetROISequence, plan.ROIContourSequence = Sequence(), Sequence()
    for number, (name, contours) in enumerate(structures, 1):
        plan.StructureSetROISequence += items(
            ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=frame_of_reference
        )
        drawn = Sequence()
        for k, points, kind in contours:
            values = [f"{value:.6f}" for point in points for value in point]
            contour = items(ContourGeometricType=kind, NumberOfContourPoints=len(points), ContourData=values)
            if k is not None:
                uid = images.uids[k] if isinstance(k, int) else k
                contour[0].ContourImageSequence = items(ReferencedSOPClassUID=CT, ReferencedSOPInstanceUID=uid)
            drawn += contour
        plan.ROIContourSequence += items(ReferencedROINumber=number, ContourSequence=drawn)
    write(plan, path, RTSTRUCT, generate_uid())


def read(convert, root, **options):
    return collect_with_reasons(convert(root, "set", "CC0", **options))


def mask(y1, y2, x1, x2, size=SIZE):
    inside = np.zeros(size, np.uint8)
    inside[y1:y2, x1:x2] = 1
    return inside


def box(y1, y2, x1, x2):
    return pytest.approx([x1 / SIZE[1], y1 / SIZE[0], x2 / SIZE[1], y2 / SIZE[0]])


def circle(x, y, radius, count=720):
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], 1)


def in_circle(x, y, radius):
    rows, columns = np.indices(SIZE)
    return (columns - x) ** 2 + (rows - y) ** 2 < radius**2


# SEG


@pytest.mark.parametrize("derived", [True, False])
def test_seg_frames_in_another_order_than_the_images(tmp_path, derived):
    images = Images(tmp_path / "ct", axes=OBLIQUE)
    frames = [
        (2, 3, mask(1, 4, 2, 6)),
        (1, 0, mask(0, 1, 0, 1)),
        (1, 3, mask(20, 25, 30, 31)),
        (2, 1, mask(5, 6, 7, 8)),
    ]
    segments = [("Kidney", "Kidney", "Right"), ("Segment 2", "Liver", None)]
    save_seg(tmp_path / "seg/a.dcm", images, frames, segments, derived=derived)
    samples, skipped = read(dicom_seg, tmp_path)
    assert not skipped
    found = {sample.frame: sample for sample in samples}
    assert list(found) == [0, 1, 3]  # by their place, which is neither the order of names nor of instance numbers
    assert [sample.image for sample in samples] == [str(images.paths[k]) for k in (0, 1, 3)]
    assert found[3].regions.texts == ["Segment 2", "right Kidney"]
    assert found[3].regions.labels == [label("liver"), label("right kidney")]
    assert found[3].regions.boxes[0].tolist() == box(1, 4, 2, 6)
    assert found[3].regions.boxes[1].tolist() == box(20, 25, 30, 31)
    assert (decoded(found[3].regions.masks[0]) == frames[0][2]).all()
    assert found[0].regions.boxes[0].tolist() == box(0, 1, 0, 1)
    assert set(found[0].labelled) == {label("liver"), label("right kidney")}
    assert found[1].spacing == SPACING and found[1].modality == "ct" and found[1].licence == "CC0"


def test_no_identifier_of_the_patient_reaches_a_sample(tmp_path):
    images = Images(tmp_path / "ct")
    save_seg(tmp_path / "seg.dcm", images, [(1, 0, mask(0, 2, 0, 2))], [("Liver", "Liver", None)])
    sample = read(dicom_seg, tmp_path)[0][0]
    assert sample.patient_id == "set/" + hashlib.sha256(b"Doe^Jane 1970").hexdigest()[:16]
    assert "Doe" not in repr(sample) and images.series not in repr(sample)


def test_images_without_a_segment(tmp_path):
    images = Images(tmp_path / "ct")
    save_seg(tmp_path / "seg.dcm", images, [(1, 2, mask(0, 2, 0, 2))], [("Liver", "Liver", None)])
    assert [sample.frame for sample in read(dicom_seg, tmp_path)[0]] == [2]
    samples, _ = read(dicom_seg, tmp_path, skip_empty="false")
    assert [len(sample.regions) for sample in samples] == [0, 0, 1, 0]
    assert {sample.labelled for sample in samples} == {(label("liver"),)}


def test_two_segs_of_one_series_come_together(tmp_path):
    images = Images(tmp_path / "ct")
    for name in ("Liver", "Spleen"):
        save_seg(tmp_path / f"{name}.dcm", images, [(1, 1, mask(0, 2, 0, 2))], [(name, name, None)])
    samples, skipped = read(dicom_seg, tmp_path)
    assert not skipped and len(samples) == 1 and samples[0].regions.texts == ["Liver", "Spleen"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"frame_of_reference": generate_uid()}, "another frame of reference"),
        ({"kind": "FRACTIONAL"}, "only BINARY"),
        ({"NumberOfFrames": 9}, "9 frames"),
        ({"NumberOfFrames": 2_000_000_000}, "frames"),
        ({"Rows": 24}, "24"),
        ({"SegmentSequence": Sequence()}, "segment 1"),
        ({"PixelData": b"\0\0"}, ""),
        ({"PerFrameFunctionalGroupsSequence": Sequence()}, "0 descriptions"),
    ],
)
def test_segs_that_do_not_fit_are_refused(tmp_path, changes, why):
    images = Images(tmp_path / "ct")
    segments = [("Liver", "Liver", None)]
    save_seg(tmp_path / "seg.dcm", images, [(1, 0, mask(0, 2, 0, 2)), (1, 1, mask(0, 2, 0, 2))], segments, **changes)
    samples, skipped = read(dicom_seg, tmp_path)
    assert not samples and skipped and all(key == "ct/001.dcm" for key, _ in skipped)
    assert any("seg.dcm" in reason and why in reason for _, reason in skipped)


def test_a_frame_that_lies_elsewhere_than_its_image_costs_only_itself(tmp_path):
    images = Images(tmp_path / "ct")
    frames = [(1, 0, mask(0, 2, 0, 2)), (2, 1, mask(0, 2, 0, 2)), (2, 2, mask(0, 2, 0, 2))]
    save_seg(tmp_path / "seg.dcm", images, frames, [("Liver", "Liver", None), ("Spleen", "Spleen", None)])
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    groups = seg.PerFrameFunctionalGroupsSequence
    groups[1].PlanePositionSequence[0].ImagePositionPatient = list(images.position(3))
    groups[2].DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = generate_uid()
    seg.save_as(tmp_path / "seg.dcm")
    samples, skipped = read(dicom_seg, tmp_path)
    assert [sample.regions.texts for sample in samples] == [["Liver"]]
    assert samples[0].labelled == (label("liver"),)  # the spleen is no longer known to be complete
    assert len(skipped) == 2 and "frame 1" in skipped[0][1] and "frame 2" in skipped[1][1]


def test_every_file_is_kept_or_named(tmp_path):
    used = Images(tmp_path / "a")
    save_seg(tmp_path / "a/seg.dcm", used, [(1, k, mask(0, 2, 0, 2)) for k in range(4)], [("Liver", "Liver", None)])
    Images(tmp_path / "b", count=2)  # nothing refers to it
    Images(tmp_path / "pet", count=1, modality="PT")
    gone = Images(tmp_path / "gone", count=1)
    save_seg(tmp_path / "orphan.dcm", gone, [(1, 0, mask(0, 2, 0, 2))], [("Liver", "Liver", None)])
    gone.paths[0].unlink()
    (tmp_path / "a/copy.dcm").write_bytes(used.paths[0].read_bytes())
    (tmp_path / "a/half.dcm").write_bytes(used.paths[1].read_bytes()[:200])
    (tmp_path / "a/zero.dcm").write_bytes(b"")
    (tmp_path / "a/README.txt").write_text("no DICOM")
    several = pydicom.dcmread(used.paths[0])
    several.NumberOfFrames, several.SOPInstanceUID = 3, generate_uid()
    several.save_as(tmp_path / "a/frames.dcm")
    samples, skipped = read(dicom_seg, tmp_path)
    assert len(samples) == 4
    assert {key for key, _ in skipped} == {
        "a/copy.dcm",
        "a/half.dcm",
        "a/zero.dcm",
        "a/frames.dcm",
        "b/001.dcm",
        "pet/001.dcm",
        "orphan.dcm",
    }


def test_files_without_a_suffix_keep_their_whole_name(tmp_path):
    images = Images(tmp_path, suffix=".0.25")
    save_seg(tmp_path / "seg", images, [(1, 0, mask(0, 2, 0, 2)), (1, 1, mask(0, 2, 0, 2))], [("Liver", "Liver", None)])
    samples, skipped = read(dicom_seg, tmp_path)
    assert not skipped and [sample.image_id for sample in samples] == ["set/004.0.25", "set/003.0.25"]


# RTSTRUCT


@pytest.mark.parametrize("axes", [AXIAL, OBLIQUE])
@pytest.mark.parametrize("named", [True, False])
def test_a_circle_in_the_plane_of_its_image(tmp_path, axes, named):
    images = Images(tmp_path / "ct", axes=axes)
    contour = (2 if named else None, images.points(2, circle(14.2, 11.3, 7.07)), "CLOSED_PLANAR")
    save_rtstruct(tmp_path / "rs.dcm", images, [("Kidney_L", [contour])])
    samples, skipped = read(dicom_rtstruct, tmp_path)
    assert not skipped and [sample.frame for sample in samples] == [2]
    expected = in_circle(14.2, 11.3, 7.07)
    assert (decoded(samples[0].regions.masks[0]) == expected).all()
    rows, columns = np.nonzero(expected)
    assert samples[0].regions.boxes[0].tolist() == box(rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    assert samples[0].regions.texts == ["Kidney_L"] and samples[0].regions.labels == [label("left kidney")]


@pytest.mark.parametrize("kind", ["CLOSED_PLANAR", "CLOSEDPLANAR_XOR"])
def test_a_ring_inside_a_ring_is_a_hole_and_one_beside_it_is_more(tmp_path, kind):
    images = Images(tmp_path / "ct", axes=OBLIQUE)
    rings = [(11.2, 12.3, 8.03), (11.6, 12.1, 3.04), (26.1, 12.4, 3.02)]
    contours = [(1, images.points(1, circle(*ring)), kind) for ring in rings]
    save_rtstruct(tmp_path / "rs.dcm", images, [("Lung_R", contours)])
    samples, skipped = read(dicom_rtstruct, tmp_path)
    outer, hole, beside = (in_circle(*ring) for ring in rings)
    assert not skipped and (decoded(samples[0].regions.masks[0]) == (outer & ~hole | beside)).all()
    assert len(samples[0].regions) == 1


def test_a_contour_over_the_edge_is_cut_there(tmp_path):
    images = Images(tmp_path / "ct")
    square = images.points(0, [(-1e6, 20.6), (4.4, 20.6), (4.4, 1e6), (-1e6, 1e6)])
    save_rtstruct(tmp_path / "rs.dcm", images, [("Liver", [(0, square, "CLOSED_PLANAR")])])
    samples, _ = read(dicom_rtstruct, tmp_path)
    assert samples[0].regions.boxes[0].tolist() == box(21, 25, 0, 5)


def test_wrong_contours_cost_only_their_structure_on_that_image(tmp_path):
    images = Images(tmp_path / "ct")
    good, off = images.points(0, circle(10, 10, 4.1)), images.points(3, circle(10, 10, 4.1))
    tilted = [point + [0, 0, 3 * x] for point, x in zip(good, np.linspace(0, 1, len(good)), strict=True)]
    nan = [*good[:5], np.array([np.nan, 0, 0])]
    structures = [("Heart", [(0, good, "CLOSED_PLANAR"), (1, images.points(1, circle(9, 9, 3.1)), "CLOSED_PLANAR")])]
    for name, contour in {
        "off": (0, off, "CLOSED_PLANAR"),
        "tilted": (0, tilted, "CLOSED_PLANAR"),
        "point": (0, good[:1], "POINT"),
        "open": (0, good, "OPEN_PLANAR"),
        "two": (0, good[:2], "CLOSED_PLANAR"),
        "nan": (0, nan, "CLOSED_PLANAR"),
        "gone": (generate_uid(), good, "CLOSED_PLANAR"),
        "tiny": (0, images.points(0, circle(10.5, 10.5, 0.1)), "CLOSED_PLANAR"),
    }.items():
        structures.append((name, [contour, (1, images.points(1, circle(9, 9, 3.1)), "CLOSED_PLANAR")]))
    structures[0][1].append((1, good[:2], "CLOSED_PLANAR"))  # perhaps a hole
    save_rtstruct(tmp_path / "rs.dcm", images, structures)
    samples, skipped = read(dicom_rtstruct, tmp_path)
    found = {sample.frame: sample.regions.texts for sample in samples}
    assert found[0] == ["Heart"]
    assert sorted(found[1]) == ["gone", "nan", "off", "open", "point", "tilted", "tiny", "two"]
    assert len(skipped) == 9 and samples[0].labelled == ()


def test_a_structure_set_of_another_frame_of_reference_is_refused(tmp_path):
    images = Images(tmp_path / "ct")
    contour = (0, images.points(0, circle(10, 10, 4.1)), "CLOSED_PLANAR")
    save_rtstruct(tmp_path / "rs.dcm", images, [("Heart", [contour])], frame_of_reference=generate_uid())
    samples, skipped = read(dicom_rtstruct, tmp_path)
    assert not samples and "another frame of reference" in skipped[0][1]


def test_even_odd_filling_counts_pixel_centres():
    square = np.array([[1, 1], [4, 1], [4, 3], [1, 3]], float)
    assert np.argwhere(fill([square], (6, 6))).tolist() == [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert (fill([square[::-1]], (6, 6)) == fill([square], (6, 6))).all()
    assert not fill([square, square], (6, 6)).any()


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom names every odd value
@pytest.mark.parametrize("convert", [dicom_seg, dicom_rtstruct])
def test_damaged_files_never_raise_anything_else(tmp_path, convert):
    images = Images(tmp_path / "ct", count=2)
    path, random = tmp_path / "marks.dcm", np.random.default_rng(1)
    if convert is dicom_seg:
        save_seg(path, images, [(1, 0, mask(0, 2, 0, 2)), (1, 1, mask(3, 9, 0, 2))], [("Liver", "Liver", "Left")])
    else:
        contours = [(0, images.points(0, circle(10, 10, 4.1, 12)), "CLOSED_PLANAR")]
        save_rtstruct(path, images, [("Liver", contours)])
    whole = path.read_bytes()
    assert read(convert, tmp_path)[0]
    for _ in range(60):
        raw = bytearray(whole)
        for place in random.integers(0, len(raw), 5):
            raw[place] = random.integers(256)
        path.write_bytes(raw[: random.integers(1, len(raw) + 1)] if random.random() < 0.3 else raw)
        samples, skipped = read(convert, tmp_path)
        assert samples or skipped


def test_options(tmp_path):
    with pytest.raises(AnnotationError, match="true or false"):
        read(dicom_seg, tmp_path, skip_empty="1")
    with pytest.raises(AnnotationError, match="no file"):
        read(dicom_seg, tmp_path)
