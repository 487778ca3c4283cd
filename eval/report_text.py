"""The sentences of a report that describe the images: without history, headings, bullets and line breaks."""

import re

_HEADINGS_LEFT_OUT = (
    r"indications?|clinical (?:indication|history|information|data)|history|reason for (?:exam(?:ination)?|study)"
    r"|comparisons?|techniques?|procedure|exam(?:ination)?|views?|priors?|additional information|clinical statement"
)
_HEADING = re.compile(
    rf"(?:^|(?<=[.\n;:]))[ \t]*(?:(?P<out>{_HEADINGS_LEFT_OUT})|findings?|impressions?|conclusions?|opinion|report"
    r"|results?|interpretation|summary|recommendations?)[ \t]*:",
    re.IGNORECASE,
)
_END_OF_SECTION = re.compile(r"\n|[.;](?=\s|$)")
_BULLET = re.compile(r"(?:(?<=\n)|^)[ \t]*(?:[-*•·–—]+|\(?\d{1,2}[.)])[ \t]+|(?<=[.;:?!])\s+\(?\d{1,2}[.)]\s+(?=\D)")
_SENTENCE = re.compile(r"(?:[.!;]+|(?<=\w\?))(?=\s|$)|(?<=[^\W\d_]{3})\.(?=[^\W\d_]{2})|\n")
_LONGEST = 2000  # characters
_WRAPPED = 40  # characters: a shorter line was ended by its writer


def sentences(report: str) -> list[str]:
    """The sentences of a report, without history, comparison, technique, bullets and numbers of a list."""
    text = _BULLET.sub("\n", _unwrapped(_without_sections(report.replace("\r\n", "\n"))))
    found = (sentence.strip() for sentence in _SENTENCE.split(text))
    return [piece for sentence in found if sentence for piece in _pieces(sentence)]


def _pieces(sentence: str) -> list[str]:
    """What is too long for a sentence, in pieces that end with a comma where there is one: the time to read a sentence
    grows with its square."""
    pieces = []
    while len(sentence) > _LONGEST:
        comma, space = (sentence.rfind(mark, _LONGEST // 2, _LONGEST) for mark in ", ")
        end = comma if comma > 0 else space if space > 0 else _LONGEST - 1
        pieces.append(sentence[: end + 1])
        sentence = sentence[end + 1 :]
    return [*pieces, sentence]


def _without_sections(report: str) -> str:
    """The report without the sections that do not describe the images; one goes on to the next heading, else to the
    end of its line or sentence."""
    headings = list(_HEADING.finditer(report))
    kept, at = [], 0
    for heading, following in zip(headings, [*headings[1:], None], strict=False):
        kept.append(report[at : heading.start()])
        at = heading.end()
        if heading["out"] and following is not None:
            at = following.start()
        elif heading["out"]:
            end = _END_OF_SECTION.search(report, at + len(report[at:]) - len(report[at:].lstrip()))
            at = end.end() if end else len(report)
    return "\n".join([*kept, report[at:]])


def _unwrapped(text: str) -> str:
    """Joins lines that were broken only because the next word did not fit any more."""
    lines = text.split("\n")
    width = max(map(len, lines))
    joined = lines[0]
    for line, following in zip(lines, lines[1:], strict=False):
        first = following.lstrip(" ").partition(" ")[0]
        fits = len(line) + 1 + len(first) <= width
        wrapped = len(line) >= _WRAPPED and first[:1] not in ("", "\t") and not fits and not _BULLET.match(following)
        joined += (" " if wrapped else "\n") + following
    return joined
