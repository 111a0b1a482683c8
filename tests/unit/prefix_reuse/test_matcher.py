from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from sagellm_common.core.types import as_token_ids, pack_int32
from sagellm_common.prefix_reuse.matcher import PrefixMatcher, contexts, same_block

ROOT = b"root"
NAMES = [b"1", b"2", b"3"]
TOKENS = list(range(12))


@dataclass(frozen=True, slots=True)
class Block:
    hash: bytes
    token_bytes: bytes
    parent: bytes = b""
    context: bytes = b""


def blocks(tokens: list[int] = TOKENS, root: bytes = ROOT) -> dict[bytes, Block]:
    """Blocks of four tokens, under the names 1, 2, 3."""
    packed = pack_int32(tokens)
    told = contexts(root, packed, 16)
    return {
        name: Block(name, packed[16 * n : 16 * (n + 1)], NAMES[n - 1] if n else root, next(told))
        for n, name in enumerate(NAMES)
    }


def verified(stored: dict[bytes, Block], tokens: list[int] = TOKENS, root: bytes = ROOT) -> tuple[int, int]:
    """(blocks found, hits rejected)"""
    matcher = PrefixMatcher(4)
    found = matcher.verify(NAMES, as_token_ids(tokens), stored.get, root)
    assert [block.hash for block in found] == NAMES[: len(found)]
    return len(found), matcher.rejected


def test_what_is_stored_for_these_tokens_is_found() -> None:
    assert verified(blocks()) == (3, 0)
    assert verified(blocks(), [*TOKENS, 7]) == (3, 0)
    assert verified({name: block for name, block in blocks().items() if name != b"2"}) == (1, 0)
    assert verified({}) == (0, 0)


@pytest.mark.parametrize(("position", "found"), [(0, 0), (5, 1), (11, 2)])
def test_other_tokens_under_a_name_are_no_hit(position: int, found: int) -> None:
    other = [*TOKENS]
    other[position] += 1
    assert verified(blocks(other)) == (found, 1)


def test_a_block_computed_after_other_tokens_is_no_hit() -> None:
    """It has the name, the tokens and the name of the parent; the parent was another's when it was computed."""
    stored = blocks() | {b"2": blocks([9, *TOKENS[1:]])[b"2"]}
    assert (stored[b"2"].token_bytes, stored[b"2"].parent) == (blocks()[b"2"].token_bytes, b"1")
    assert verified(stored) == (1, 1)
    assert verified(stored, root=b"") == (3, 0), "without the beginning nobody can tell"


def test_a_block_of_another_root_is_no_hit() -> None:
    stored = {name: replace(block, parent=b"") for name, block in blocks(root=b"another tenant").items()}
    assert verified(stored) == (0, 1)


def test_a_block_after_another_name_is_no_hit() -> None:
    stored = {name: replace(block, context=b"") for name, block in blocks().items()}
    assert verified(stored) == (3, 0)
    assert verified(stored | {b"3": replace(stored[b"3"], parent=b"1")}) == (2, 1)


def test_what_is_not_known_of_a_block_does_not_tell_it_from_another() -> None:
    one = blocks()[b"2"]
    assert same_block(one, replace(one, parent=b"")) and same_block(one, replace(one, context=b""))
    for other in (replace(one, token_bytes=b"x"), replace(one, parent=b"x"), replace(one, context=b"x")):
        assert not same_block(one, other)
