"""Damage to files: the same cases in every run, and a count of what became of them."""

import struct
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_NUMBERS = (0, 1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS = [struct.pack(order, number) for number in _NUMBERS for order in ("<I", ">I")]
_place = st.integers(0, 2**20)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), _place, st.integers(0, 7)),
        st.tuples(st.just("write"), _place, st.binary(min_size=1, max_size=4) | st.sampled_from(_WORDS)),
        st.tuples(st.just("insert"), _place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("remove"), _place, st.integers(1, 64)),
        st.tuples(st.just("repeat"), _place, st.integers(1, 64)),
        st.tuples(st.just("cut"), _place, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, changes: list[tuple], start: int = 0) -> bytes:
    """Applies changes one after the other; their places are taken modulo the length behind `start`."""
    found = bytearray(content)
    for kind, place, value in changes:
        if len(found) <= start:
            break
        at = start + place % (len(found) - start)
        if kind == "flip":
            found[at] ^= 1 << value
        elif kind == "write":
            found[at : at + len(value)] = value
        elif kind == "insert":
            found[at:at] = value
        elif kind == "remove":
            del found[at : at + value]
        elif kind == "repeat":
            found[at:at] = found[at : at + value]
        else:
            del found[at:]
    return bytes(found)


def cases(count: int) -> settings:
    """Settings of a test that always draws the same cases and keeps no files."""
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def report(record_property, what: str, outcomes: Counter) -> int:
    """Has the counts printed at the end of the test run, and returns the number of cases."""
    parts = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common())
    record_property("fuzz", f"{what}: {outcomes.total():,} cases: {parts}")
    return outcomes.total()
