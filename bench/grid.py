"""``flashx-bench run``'s grid: what each variant's options are, and every combination of them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .cases import CAUSAL, DTYPES, FULL, Case, Dense, Direction, Size, Window
from .variants import VARIANTS

T = TypeVar("T")
Fields = dict[str, Any]


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def number(what: str) -> Callable[[str], float]:
    """Parses a finite number of at least 0."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {what}, at least 0, got {text!r}")
        return value

    return parse


def several(item: Callable[[str], T], separator: str = ",") -> Callable[[str], list[T]]:
    return lambda text: [item(part.strip()) for part in text.split(separator)]


def choice(what: str, names: Collection[str]) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{what} must be one of {', '.join(names)}, got {text!r}")
        return text

    return choose


def dtype(text: str) -> str:
    long = {str(dtype).removeprefix("torch."): short for short, dtype in DTYPES.items()}
    return choice("dtype", DTYPES)(long.get(text, text))


def _size(text: str) -> Size:
    first, cross, second = text.partition("x")
    return positive(first), positive(second if cross else first)


def _window(text: str) -> Window:
    left, comma, right = text.partition(",")
    return _width(left), _width(right) if comma else 0


def _width(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0 or 'none', got {text!r}")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(several(positive, "x")(text))


def _tree(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    nodes, slash, tokens = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"must be nodes per level / tokens of each, such as 1,16/256,32, got {text!r}")
    return tuple(several(positive)(nodes)), tuple(several(positive)(tokens))


def _share(text: str) -> float:
    value = number("a percentage below 100")(text)
    if value >= 100:
        raise argparse.ArgumentTypeError(f"must be a percentage below 100, got {text!r}")
    return value / 100


CAUSALS = {"no": [False], "yes": [True], "both": [False, True]}


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a grid. ``fields`` turns a value into fields of a case, for each variant that has the option."""

    flag: str
    metavar: str
    text: str
    parse: Callable[[str], Any]
    fields: dict[str, Callable[[Any], Fields]]
    default: Sequence[Any]
    repeated: bool = False

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _all(fields: Callable[[Any], Fields]) -> dict[str, Callable[[Any], Fields]]:
    return dict.fromkeys(VARIANTS, fields)


def _field(name: str) -> Callable[[Any], Fields]:
    return lambda value: {name: value}


OPTIONS = [
    Option(
        "--seqlen", "N|LQxLK,...", "lengths (1024); LQxLK in dense only", several(_size),
        {
            "dense": lambda size: {"q_len": size[0], "k_len": size[1]},
            "block-sparse": lambda size: {"length": _equal(size)},
        },
        [(1024, 1024)],
    ),
    Option(
        "--headdim", "D|DxDV,...", "dims of key and value heads (64)", several(_size),
        _all(lambda size: {"head_dim": size[0], "value_dim": size[1]}), [(64, 64)],
    ),
    Option("--heads", "H,...", "query heads (8)", several(positive), _all(_field("q_heads")), [8]),
    Option(
        "--kv-heads", "H,...", "key heads (as many as query heads)", several(positive), _all(_field("kv_heads")), [None]
    ),
    Option(
        "--batch", "B,...", "sequences (1; shared-prefix 16, decode 4)", several(positive),
        {
            **{name: _field("batch") for name in ("dense", "block-sparse", "shared-prefix", "neighborhood")},
            "decode": _field("batch"),
        },
        [None],
    ),
    Option("--dtype", "DTYPE,...", f"{', '.join(DTYPES)} (fp32)", several(dtype), _all(_field("dtype")), ["fp32"]),
    Option(
        "--causal", "no|yes|both", "causal masks, aligned bottom-right (no; varlen yes)", choice("causal", CAUSALS),
        {name: _field("causal") for name in ("dense", "block-sparse", "varlen", "neighborhood")}, [None],
    ),
    Option(
        "--window", "LEFT[,RIGHT]",
        "sliding window: keys seen on each side, or 'none' for all; RIGHT is 0 if left out; may be repeated", _window,
        {"dense": _field("window"), "decode": lambda window: {"window": window[0]}}, [FULL], repeated=True,
    ),
    Option(
        "--sink-tokens", "N,...", "first keys that the window does not hide (0)", several(count),
        {name: _field("sink_tokens") for name in ("dense", "decode")}, [0],
    ),
    Option(
        "--softcap", "C,...", "logits capped at C by tanh (0: not)", several(number("a number")),
        _all(_field("softcap")), [0.0],
    ),
    Option(
        "--sparsity", "PERCENT,...", "share of blocks hidden (50)", several(_share),
        {"block-sparse": _field("sparsity")}, [0.5],
    ),
    Option(
        "--block", "N,...", "queries and keys of a block (64)", several(positive),
        {"block-sparse": _field("block")}, [64],
    ),
    Option(
        "--prefix", "N,...", "keys of the shared prefix (1024)", several(positive),
        {"shared-prefix": _field("prefix")}, [1024],
    ),
    Option(
        "--suffix", "N,...", "own keys of each sequence (128)", several(positive),
        {"shared-prefix": _field("suffix")}, [128],
    ),
    Option(
        "--groups", "G,...", "prefixes, each shared by a part of the batch (1)", several(positive),
        {"shared-prefix": _field("groups")}, [1],
    ),
    Option(
        "--queries", "N,...", "queries of each sequence (1)", several(positive),
        {name: _field("q_len") for name in ("shared-prefix", "tree", "decode")}, [1],
    ),
    Option(
        "--tree", "N,../T,..", "nodes per level / tokens of each; the last are the sequences (1,4,16/256,64,32); "
        "may be repeated", _tree, {"tree": lambda tree: {"nodes": tree[0], "tokens": tree[1]}},
        [((1, 4, 16), (256, 64, 32))], repeated=True,
    ),
    Option(
        "--lens", "N+N+...,...", "lengths of packed sequences (128+256+512+1024), or of caches",
        several(several(positive, "+")),
        {name: (lambda lens: {"lens": lens and tuple(lens)}) for name in ("varlen", "decode")}, [None],
    ),
    Option(
        "--cache", "N,...", "keys in each cache (4096)", several(positive), {"decode": _field("cache")}, [None]
    ),
    Option("--page", "N,...", "keys of a page; 0 is a contiguous cache (0)", several(count),
           {"decode": _field("page")}, [0]),
    Option("--grid", "LxL,...", "tokens along each axis (32x32)", several(_sizes),
           {"neighborhood": _field("spatial")}, [(32, 32)]),
    Option("--kernel", "N|NxN,...", "window along each axis (7)", several(_sizes),
           {"neighborhood": _field("kernel")}, [(7,)]),
    Option("--stride", "N|NxN,...", "stride along each axis (1)", several(_sizes),
           {"neighborhood": _field("stride")}, [(1,)]),
    Option("--dilation", "N|NxN,...", "dilation along each axis (1)", several(_sizes),
           {"neighborhood": _field("dilation")}, [(1,)]),
]  # fmt: skip

# Switches: fields of a case that are either set or not.
SWITCHES = {"sinks": "a learned sink logit per head", "bias": "a bias added to the logits [dense]"}


def _equal(size: Size) -> int:
    if size[0] != size[1]:
        raise ValueError(f"seqlen must be one number for block-sparse, got {size[0]}x{size[1]}")
    return size[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The grid's options."""
    group = parser.add_argument_group(
        "cases",
        "Lists are separated by commas, and every combination is measured. Defaults are in parentheses,\nthe variants "
        "that have an option in brackets, if not all have it. Without any of these: a small tour.",
    )
    group.add_argument(
        "--variant", choices=VARIANTS, metavar="NAME", help=f"kind of attention: {', '.join(VARIANTS)} (dense)"
    )
    for option in OPTIONS:
        action = "append" if option.repeated else "store"
        only = "" if len(option.fields) == len(VARIANTS) else f" [{', '.join(option.fields)}]"
        group.add_argument(
            option.flag, type=option.parse, action=action, metavar=option.metavar, help=option.text + only
        )
    for name, text in SWITCHES.items():
        group.add_argument(f"--{name}", action="store_true", help=text)


def is_empty(options: argparse.Namespace) -> bool:
    """Whether no option of the grid is given."""
    given = [getattr(options, option.name) is not None for option in OPTIONS]
    return options.variant is None and not any(given) and not any(getattr(options, name) for name in SWITCHES)


def cases(options: argparse.Namespace, directions: Sequence[Direction]) -> list[Case]:
    """Every combination once.

    Raises:
        ValueError: an option that the variant does not have, or values that do not go together.
    """
    variant = options.variant or "dense"
    kind = VARIANTS[variant]
    axes: list[list[Fields]] = []
    for option in OPTIONS:
        values = getattr(options, option.name)
        if variant not in option.fields:
            if values is not None:
                raise ValueError(f"{option.flag} does not apply to {variant}")
            continue
        if option.name == "causal" and values is not None:
            values = CAUSALS[values]
        axes.append([option.fields[variant](value) for value in (option.default if values is None else values)])
    if options.bias and kind is not Dense:
        raise ValueError(f"--bias does not apply to {variant}")
    if kind.FORWARD_ONLY:
        directions = [direction for direction in directions if direction == "fwd"] or ["fwd"]
    found: list[Case] = []
    for combination in itertools.product(*axes, [{"direction": direction} for direction in directions]):
        fields = {name: value for part in combination for name, value in part.items()}
        fields["sinks"] = options.sinks
        if options.bias:
            fields["bias"] = True
        found.append(kind(**_finished(variant, fields)))
    return list(dict.fromkeys(found))


def _finished(variant: str, fields: Fields) -> Fields:
    """What one option says of another's field, and defaults that depend on the variant; None is no value."""
    if fields["kv_heads"] is None:
        fields["kv_heads"] = fields["q_heads"]
    causal, batch = fields.pop("causal", None), fields.pop("batch", None)
    if variant == "dense":
        left, right = fields["window"]
        fields["window"] = (left, CAUSAL[1] if causal else right)
    elif causal is not None:
        fields["causal"] = causal
    if variant in ("dense", "block-sparse", "shared-prefix", "neighborhood"):
        fields["batch"] = batch or (16 if variant == "shared-prefix" else 1)
    if variant == "varlen":
        fields["lens"] = fields["lens"] or (128, 256, 512, 1024)
    if variant == "decode":
        cache = fields.pop("cache")
        if fields["lens"] is None:
            fields["lens"] = (cache or 4096,) * (batch or 4)
        elif cache or batch:
            raise ValueError("--lens already says how many caches there are, and how long")
    if variant == "neighborhood":
        axes = len(fields["spatial"])
        for name in ("kernel", "stride", "dilation"):
            fields[name] = fields[name] * axes if len(fields[name]) == 1 else fields[name]
    return fields
