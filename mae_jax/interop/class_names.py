"""Whether the classes of a model are those of a data set."""

import itertools
import re
from collections.abc import Sequence

from mae_jax import UserError


def require_same_classes(
    model: Sequence[str] | None, data: Sequence[str] | None, where: str
) -> str:
    """Refuses class names that differ or are in another order; a note where none compare, else "".

    Case and the difference of spaces, hyphens and underscores do not count. Names that only number
    the classes (`LABEL_3`) say nothing. WordNet ids on one side alone (TFDS calls ImageNet's
    classes n01440764, others call them tench) cannot be compared.
    """
    model, data = informative(model), informative(data)
    if not model or not data:
        silent = "the weights carry" if not model else f"{where} has"
        return f"{silent} no class names: only the number of classes was compared"
    if _are_wordnet_ids(model) != _are_wordnet_ids(data):
        return f"WordNet ids and words for the classes of the weights and of {where}: not compared"
    spelled = [[_spelling(name) for name in names] for names in (model, data)]
    differing = [i for i, (a, b) in enumerate(itertools.zip_longest(*spelled)) if a != b]
    if not differing:
        return ""
    first = differing[0]
    how = f"{len(differing)} of {len(model)} classes differ"
    if len(model) != len(data):
        how = f"{len(model)} in the weights, {len(data)} in the data"
    elif sorted(spelled[0]) == sorted(spelled[1]):
        how = "the same classes in another order"
    ours, theirs = (repr(names[first]) if first < len(names) else "none" for names in (model, data))
    raise UserError(
        f"{where} has other classes than the weights: {how}; number {first} is {theirs} in "
        f"the data and {ours} in the weights. Take the data the weights were trained for "
        "(or --class_names=none if they are the same classes, spelled otherwise)"
    )


def informative(names: Sequence[str] | None) -> tuple[str, ...]:
    """Class names; none where they only count the classes."""
    numbered = (
        re.fullmatch(rf"(label|class)?[ _]?0*{i}", name, re.IGNORECASE)
        for i, name in enumerate(names or ())
    )
    return () if all(numbered) else tuple(names)


def _are_wordnet_ids(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def _spelling(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
