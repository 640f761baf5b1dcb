"""What is asked of Snakemake, before it says that there is no rule, or that a file of another scale is up to date."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from mutor.checks import choose


def check_target(
    target: str, rules: Collection[str], made: Collection[str], scale: str, here: str, homes: Mapping[str, str]
) -> None:
    """Raise ValueError for a word that is no rule, and for a file in a folder of results that is not made there.

    rules: their names; made: names of the files that `scale` makes in its folder `here`; homes: scale -> the folder
    where its results stand by default. What lies elsewhere is left to Snakemake.
    """
    home, name = os.path.split(os.path.normpath(target))
    if not home and "." not in name:
        choose(name, rules, "target")
    if home not in (here, *homes.values()) or (home == here and name in made):
        return
    stem = os.path.splitext(name)[0]
    if name in made:
        other = next(other for other, folder in homes.items() if folder == home)
        whose = f"is of scale {other} (--config scale={other})" if other != scale else f"is not in results={here}"
        raise ValueError(f"{target} {whose}; {stem} of scale {scale} is {here}/{name}")
    choose(stem, {os.path.splitext(file)[0] for file in made}, target)
    choose(name, [file for file in made if os.path.splitext(file)[0] == stem], target)
