"""docs/results/architectures.md, made of the results alone."""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from .examine import FOLDS_TO, Reason, Result

__all__ = ["cause", "page"]

# Why a norm is not paired, or stays when the others are folded: what the library says, and what is behind it.
CAUSES = {
    "a": (
        r"the result of .*\b(add|iadd|add_|sub|rsub)$",
        "follows a sum",
        "pre-activation order, or the sum of several branches: no one map makes its input",
    ),
    "b": (
        r"the result of .*\bcat$",
        "follows a concatenation",
        "dense blocks, convolutions of several kernels side by side: several maps make its input",
    ),
    "c": (
        r"the result of .*\b(relu_?|gelu|silu_?|hardswish_?|mul)$",
        "follows an activation or a product",
        "the identity branch of a block with several, or the order convolution, activation, norm",
    ),
    "d": (
        r"the result of .*(pool\dd|mean)$",
        "follows a pooling",
        "heads after global pooling, blocks at the start of a stage",
    ),
    "e": (r"the result of batch_norm$", "follows another norm", "it is that one which is paired"),
    "f": (
        r"(passes through .* before it|the result of (reshape|flatten|transpose|permute|view))$",
        "follows a rearranged output",
        "tokens become channels, or the batch, between the map and the norm",
    ),
    "g": (
        r"_ stands between the map and it",
        "follows an output that was changed in place",
        "a residual sum was written over it",
    ),
    "h": (
        r"not what the map's own weight gives",
        "follows a convolution that pads by itself",
        "TensorFlow's 'same' padding is done inside of its forward, out of sight of the closed forms; it folds",
    ),
    "i": (
        r"^not foldable: ",
        "its map's output has other users",
        "it is paired, but the convolution's plain output is needed elsewhere",
    ),
    "j": (r"never called it$", "is never called", "the model has it and does without; it stays as idle as it was"),
}
HEAD = """# Every architecture converts

{summary}

What was done with each, in float32 on a CPU:

1. Built with random weights and for small images, mostly the smallest of its family. Gamma and beta random, running
   statistics halfway between random ones and those of the example inputs, so that no difference can hide.
2. `ab.convert_(model.train(), ab.CBN(), example_inputs=...)`: how many norms are **paired** with the map that feeds
   them, so that past moments are carried to today's weights. The others pool past moments as they were. **Left**: norms
   that are what they were.
3. **Before**: evaluation then, against the original model's; the largest difference, of the output's largest value.
4. **Trains**: two steps of SGD on other random batches of the same shape. Losses, all gradients, and all parameters and
   buffers after each step are finite.
5. **Folded**: `ab.fold(model.eval(), example_inputs=..., strict=False)`, how many norms are gone. **Fold**: the largest
   difference to the unfolded model in evaluation, of the output's largest value.
6. **Reverts**: after `ab.revert_(model)`, names and values of the state_dict, the classes of the norms, and evaluation
   are to the bit what they were.

Detectors take a list of one such image (SSDlite: two), train on their own losses and are compared by what their parts
compute (levels, heads, heads of fixed boxes): beyond a threshold, a rounding error is another box. The others train on
the product of what they put out with random numbers. Frozen norms, as in the backbones of the DETR family, are of no
BatchNorm class and are not counted.

This page and [the rows](architectures.jsonl) are made by

```sh
pip install '.[hosts]'
python -m scripts.make_architectures     # what is not there yet; delete architectures.jsonl to begin anew
python -m scripts.make_architectures --only timm/dla34 torchvision/resnet18    # these anew
```

and beside a CPU build of torch, where torchvision's compiled operators do not load, by
`python -m tests.with_torchvision -m scripts.make_architectures`, which declares them first. The tests examine a sample
of the rows anew.
"""
FOOT = """## What is not paired or not folded, and why

Letters as in the last column of the tables. All of these norms are converted, and where they are not paired their
moments are pooled over the window without being carried to today's weights. `ab.fold` raises on a model with norms that
it cannot fold and names each with the reason; `strict=False` leaves those in place as torch's BatchNorm.

"""


def cause(text: str) -> str:
    """The letter of the cause that a reason of the library belongs to.

    Raises:
        LookupError: it belongs to none: the page has to explain it first.
    """
    said = text.removesuffix(", then dropout")  # which does nothing
    for letter, (pattern, *_) in CAUSES.items():
        if re.search(pattern, said):
            return letter
    raise LookupError(f"no cause in scripts/architectures/page.py explains {text!r}")


def page(results: Sequence[Result]) -> str:
    """The whole page."""
    sections = [HEAD.format(summary=summary(results))]
    with_norms = [result for result in results if result.norms or result.error]
    head = ("", "input", "norms", "paired", "left", "folded", "before", "trains", "fold", "reverts", "why not all")
    for library, rows in groupby(with_norms, lambda result: result.library):
        sections.append(f"## {library}\n\n{table(head, map(cells, rows))}")
    head = ("", "the norm", "norms", "unpaired", "not folded", "architectures", "", "for example")
    sections.append(FOOT + table(head, causes(results)))
    without = [(f"{r.library}: {r.name}", says(r)) for r in results if not r.norms and not r.error]
    if without:
        told = "`ab.convert_` refuses these, and says what they have instead:\n\n"
        sections.append(f"## Without BatchNorm\n\n{told}{table(('', 'convert_'), without)}")
    return "\n".join(sections)


def summary(results: Sequence[Result]) -> str:
    """The counts in a few sentences."""
    rows = [result for result in results if result.norms]
    norms, paired, folded = (sum(getattr(r, of) for r in rows) for of in ("norms", "paired", "folded"))
    converted, libraries = sum(r.converted for r in rows), len({r.library for r in rows})
    worst = max((r.fold or 0 for r in rows), default=0)
    lines = [
        f"**{len(rows)} architectures of {libraries} libraries with {norms:,} norms: {converted:,} converted,",
        f"{paired:,} ({paired / max(norms, 1):.0%}) paired with the map that feeds them, {folded:,} folded.**",
        f"In {sum(r.perfect for r in rows)} architectures all norms are paired and fold; every other row says why not.",
        f"{sum(r.holds for r in rows)} of the {len(rows)} evaluate before training as the original does, to the bit;",
        "train for two steps with every number finite; fold to within",
        f"{FOLDS_TO:.0e} (the worst to {worst:.0e}); and revert to the bit.",
    ]
    if failed := [result.key for result in results if not result.holds]:
        lines.append(f"Not so: {', '.join(failed)}.")
    if without := sum(not result.norms and not result.error for result in results):
        lines.append(f"{without} more have no BatchNorm, and are refused.")
    return "\n".join(lines)


def cells(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    if result.error:
        return (result.name, *[""] * 9, result.error)
    counts: dict[str, int] = {}
    for reason in result.reasons:
        letter = cause(reason.text)
        counts[letter] = counts.get(letter, 0) + reason.norms
    return (
        result.name,
        "×".join(map(str, result.input)),
        *map(str, (result.norms, result.paired, result.left, result.folded)),
        "same" if result.before == 0 else f"{result.before:.0e}",
        yes(result.finite),
        "same" if result.fold == 0 else f"{result.fold:.0e}",
        yes(result.reverted),
        ", ".join(f"{letter} {count}" for letter, count in sorted(counts.items())),
    )


def yes(holds: bool | None) -> str:
    return "yes" if holds else "**no**"


def causes(results: Iterable[Result]) -> list[tuple[str, ...]]:
    """A row for every cause that there is."""
    found: dict[str, list[tuple[Result, Reason]]] = {letter: [] for letter in CAUSES}
    for result in results:
        for reason in result.reasons if result.norms else ():
            found[cause(reason.text)].append((result, reason))
    rows = []
    for letter, (_, title, meaning) in CAUSES.items():
        if entries := found[letter]:
            example, first = entries[0]
            sums = [sum(getattr(reason, of) for _, reason in entries) for of in ("norms", "unpaired", "unfolded")]
            counts = map(str, (*sums, len({result.key for result, _ in entries})))
            rows.append((letter, title, *counts, meaning, f"{example.key}: `{first.first}`"))
    return rows


def says(result: Result) -> str:
    """What convert_ says of a model without BatchNorm, without what it always says."""
    return result.reasons[0].text.removeprefix("convert_: the model has no BatchNorm; ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:], ""])
