"""One name for each series, whatever a dataset calls it, so that an encoder enters another dataset by name."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from nnunet_csm.errors import UserError


@dataclass(frozen=True)
class SeriesMatch:
    """`known` is False when neither the alias table nor `-series_alias` has the name; `canonical` is then `given` itself."""

    given: str
    canonical: str
    known: bool


def canonical_series(given: Sequence[str], extra_aliases: Mapping[str, str] | None = None) -> list[SeriesMatch]:
    """One match a channel, in channel order, from the dataset's own names (`nnunet.channel_names`).

    `extra_aliases` maps names of the dataset to series names and wins over the table; one that is spelled exactly as a channel
    applies to that channel only. Raises `UserError` when a channel has no name, two channels get the same series name, or an
    extra alias fits no channel.
    """
    for channel, name in enumerate(given):
        if not isinstance(name, str) or not _spelling(name):
            raise UserError(f"channel_names has {name!r} for channel {channel}; give the series a name in dataset.json")
    extra = dict(extra_aliases or {})
    _refuse_unused_aliases(extra, given)
    matches = [_match(name, given, extra) for name in given]
    _refuse_duplicates(matches)
    return matches


def parse_aliases(flags: Sequence[str]) -> dict[str, str]:
    """`-series_alias GIVEN=NAME` as typed, e.g. `["T1 axial=T1w"]`, to {GIVEN: NAME}. Raises `UserError`."""
    aliases: dict[str, str] = {}
    for flag in flags:
        given, separator, name = (part.strip() for part in flag.rpartition("="))
        if not (separator and given and name):
            msg = f"-series_alias {flag!r} is not of the form GIVEN=NAME; write for example -series_alias 'T1 axial=T1w'"
            raise UserError(msg)
        if aliases.get(given, name) != name:
            raise UserError(f"-series_alias names {given!r} twice: {aliases[given]!r} and {name!r}; keep one of them")
        aliases[given] = name
    return aliases


@cache
def alias_table() -> dict[str, tuple[str, ...]]:
    """Canonical name -> its aliases, from `series_aliases.json`."""
    text = files("nnunet_csm.raw").joinpath("series_aliases.json").read_text(encoding="utf-8")
    return {canonical: tuple(aliases) for canonical, aliases in json.loads(text).items()}


@cache
def _canonical_by_spelling() -> dict[str, str]:
    return {_spelling(alias): canonical for canonical, aliases in alias_table().items() for alias in (canonical, *aliases)}


def _spelling(name: str) -> str:
    """What is compared: case, spaces, underscores and hyphens do not count."""
    return re.sub(r"[\s_\-]+", "", name.casefold())


def _match(name: str, given: Sequence[str], extra: Mapping[str, str]) -> SeriesMatch:
    table = _canonical_by_spelling()
    by_spelling = {_spelling(alias): target for alias, target in extra.items() if alias not in given}
    asked = extra.get(name) or by_spelling.get(_spelling(name))
    if asked is not None:
        return SeriesMatch(name, table.get(_spelling(asked), asked), known=True)
    canonical = table.get(_spelling(name))
    return SeriesMatch(name, canonical or name, known=canonical is not None)


def _refuse_unused_aliases(extra: Mapping[str, str], given: Sequence[str]) -> None:
    spellings = {_spelling(name) for name in given}
    for alias, target in extra.items():
        if _spelling(alias) not in spellings:
            msg = f"-series_alias {alias}={target}: no channel is called {alias!r}; the channels are {', '.join(given)}"
            raise UserError(msg)


def _refuse_duplicates(matches: Sequence[SeriesMatch]) -> None:
    channel_of: dict[str, int] = {}
    for channel, match in enumerate(matches):
        # by spelling, since two unknown names that differ only in case would be one series to the next reader
        first = channel_of.setdefault(_spelling(match.canonical), channel)
        if first == channel:
            continue
        other = matches[first].given
        clash = f"channels {first} ({other!r}) and {channel} ({match.given!r}) are both the series {match.canonical!r}"
        if other == match.given:
            raise UserError(f"{clash}; give each channel its own name under channel_names in dataset.json")
        raise UserError(f"{clash}; tell them apart with -series_alias '{match.given}=NAME', where NAME is a name of your own")
