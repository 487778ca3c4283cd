"""The region store: what is written comes back, by row and by block; damage is named; no store is half replaced."""

import json
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from grounding.parquet import Stream, export_parquet, import_parquet
from grounding.store import BLOCK_ROWS, StoreError, StoreWriter, open_store, write_store
from grounding.types import GroundingSample, RegionSet


def png(shade: int) -> bytes:
    file = BytesIO()
    Image.new("L", (8, 6), shade).save(file, "PNG")
    return file.getvalue()


def sample(k: int, rng: np.random.Generator) -> GroundingSample:
    """Some with masks, some without, some for every other region; some without a region."""
    n = int(rng.integers(0, 4))
    low = rng.random((n, 2)) / 2
    boxes = np.concatenate([low, low + 0.1 + rng.random((n, 2)) / 3], 1).astype(np.float32)
    regions = RegionSet(
        boxes=boxes,
        labels=[str(rng.choice(["brain/lesion", "a free phrase", "chest"])) for _ in range(n)],
        image_size=(6, 8),
        masks=[{"size": [6, 8], "counts": "11"} if k % 4 == 1 or j % 2 else None for j in range(n)] if k % 2 else None,
        attributes=[{"margin": "sharp"}] * n if n and k % 3 else None,
        texts=[f"text {rng.integers(5)}" for _ in range(n)] if n and k % 5 else None,
    )
    labelled = ("brain/lesion", "chest") if k % 2 else ()
    more = {"study_id": f"s{k // 4}", "frame": k % 4, "licence": "CC0"} if k % 4 else {}
    spacing = (0.5, 0.25) if k % 3 else None
    return GroundingSample(f"i{k}", f"p{k // 3}", "test", "mri", png(k % 250), regions, labelled, spacing, **more)


def same(a: GroundingSample, b: GroundingSample) -> bool:
    plain = [getattr(a, x) == getattr(b, x) for x in GroundingSample.__annotations__ if x != "regions"]
    columns = [getattr(a.regions, x) == getattr(b.regions, x) for x in ("labels", "masks", "attributes", "texts")]
    return all(plain + columns) and np.array_equal(a.regions.boxes, b.regions.boxes)


@pytest.fixture(scope="module")
def samples() -> list[GroundingSample]:
    rng = np.random.default_rng(0)
    return [sample(k, rng) for k in range(60)]


@pytest.fixture(scope="module")
def store(samples, tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "store"
    write_store(samples, out, "a card")
    return open_store(out)


def test_what_is_written_comes_back(store, samples):
    assert len(store) == len(samples) and store.regions == sum(len(s.regions) for s in samples)
    assert all(same(a, b) for a, b in zip(store, samples, strict=True))
    assert same(store[-1], samples[-1]) and same(store.by_id("i7"), samples[7])
    with pytest.raises(IndexError):
        store[len(samples)]


def test_the_quick_part_is_the_same(store, samples):
    for k, one in enumerate(samples):
        quick = store.metadata(k)
        assert quick[:5] == (one.image_id, one.patient_id, one.source, one.modality, (6, 8))
        assert np.array_equal(quick.boxes, one.regions.boxes)
        assert [store.labels[label] for label in quick.labels] == one.regions.labels
    blocks = np.concatenate([block.boxes for block in store.blocks])
    assert np.array_equal(blocks, np.concatenate([one.regions.boxes for one in samples]))


def test_datasets_reads_the_folder(store, samples):
    import datasets

    rows = datasets.load_from_disk(str(store.folder))
    assert len(rows) == len(samples)
    assert rows[7]["image_id"] == "i7" and rows[7]["image"]["bytes"] == samples[7].image
    assert np.allclose(rows[7]["boxes"], samples[7].regions.boxes)


def test_blocks_of_two_stores_join(store, samples, tmp_path):
    """The words of the second get other integers in the joint store, and mean the same."""
    rng = np.random.default_rng(1)
    others = [replace(sample(k, rng), image_id=f"other{k}") for k in range(9)]
    write_store(reversed(others), tmp_path / "b", "")
    writer = StoreWriter(tmp_path / "joint")
    for part in (open_store(tmp_path / "b"), store):
        for block in part.remapped(writer):
            writer.add_block(block)
    writer.close()
    joint = open_store(tmp_path / "joint")
    assert all(same(a, b) for a, b in zip(joint, [*reversed(others), *samples], strict=True))


def test_an_old_store_stays_where_the_new_one_fails(samples, tmp_path):
    write_store(samples[:5], tmp_path / "s", "")
    broken = replace(samples[5], image=b"not an image")
    with pytest.raises(ValueError, match="image bytes"):
        write_store([samples[4], broken], tmp_path / "s", "")
    assert len(open_store(tmp_path / "s")) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    write_store([], tmp_path / "s", "")
    assert len(open_store(tmp_path / "s")) == 0


def test_many_rows_make_several_blocks_and_shards(tmp_path):
    regions = RegionSet(np.array([[0, 0, 0.5, 0.5]]), ["brain"], (4, 4))
    one = GroundingSample("x", "p", "s", "mri", "a.png", regions, ("brain",))
    writer = StoreWriter(tmp_path / "s")
    for k in range(9 * BLOCK_ROWS // 4):
        writer.add(replace(one, image_id=str(k)))
    writer.close()
    store = open_store(tmp_path / "s")
    assert len(store.blocks) == 3 and store.image_ids == [str(k) for k in range(len(store))]
    assert store.metadata(BLOCK_ROWS).image_id == str(BLOCK_ROWS) == store[BLOCK_ROWS].image_id


def test_a_damaged_store_is_named(samples, tmp_path):
    with pytest.raises(StoreError, match="nowhere: not a region store"):
        open_store(tmp_path / "nowhere")
    write_store(samples[:3], tmp_path / "s", "")
    shard = tmp_path / "s" / "data-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(StoreError, match="shard cannot be read"):
        open_store(tmp_path / "s")
    about = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "s" / "store.json").write_text(json.dumps(about | {"schema_version": 1}))
    with pytest.raises(StoreError, match="schema 1, this program reads 2"):
        open_store(tmp_path / "s")


@pytest.fixture(scope="module")
def parquet(store, tmp_path_factory) -> str:
    """Two files, in a file system that is not the local one."""
    url = "memory://parquet"
    half = StoreWriter(tmp_path_factory.mktemp("halves") / "s")
    for block in store.remapped(half):
        for start in (0, 30):
            half.add_block(block.slice(start, 30))
            half._flush_blocks()
    half.close()
    half.describe("the card")
    assert export_parquet(open_store(half.folder), url) == 2
    return url


def test_parquet_there_and_back(store, parquet, tmp_path):
    back = import_parquet(parquet, tmp_path / "back")
    assert all(same(a, b) for a, b in zip(store, back, strict=True)) and back.card == "the card"
    with pytest.raises(StoreError, match="no Parquet file"):
        import_parquet("memory://nothing", tmp_path / "none")
    assert [file.name for file in tmp_path.iterdir()] == ["back"]


def test_a_stream_is_split_over_ranks_and_goes_on_where_it_stopped(samples, parquet):
    everything = sorted(one.image_id for one in samples)
    ranks = [[one.image_id for one in Stream(parquet, 3, rank, 2)] for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == everything and all(ranks)
    stream = Stream(parquet, 3, mix=1)
    whole, second = [one.image_id for one in stream], [one.image_id for one in stream]
    assert sorted(whole) == sorted(second) == everything and whole != second
    for stop in (7, 30, 45):
        first, again = Stream(parquet, 3, mix=1), Stream(parquet, 3, mix=1)
        ids = [one.image_id for _, one in zip(range(stop), first, strict=False)]
        again.position = first.position
        assert ids + [one.image_id for one in again] == whole
