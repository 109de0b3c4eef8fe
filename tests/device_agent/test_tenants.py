"""Who a caller is, and what it may: decisions without sockets."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from device_agent.tenants import Tenant, identify, key_sha256, new_key

KEYS = {name: new_key() for name in ("shop", "lab")}
TENANTS = (
    Tenant(id="shop", key_sha256=key_sha256(KEYS["shop"]), models=("a", "b")),
    Tenant(id="lab", key_sha256=key_sha256(KEYS["lab"]), unix_uids=(1000, 0)),
    Tenant(id="cron", unix_uids=(7,)),
)


def who(*authorization: bytes, uid: int | None = None) -> str | None:
    found = identify(TENANTS, authorization, uid)
    return None if found is None else found.id


def bearer(name: str) -> bytes:
    return b"Bearer " + KEYS[name].encode()


def test_a_key_names_its_tenant() -> None:
    assert who(bearer("shop")) == "shop" and who(bearer("lab")) == "lab"
    assert who(b"bEARER  " + KEYS["lab"].encode() + b" ") == "lab", "the scheme has no case"
    assert who() is None and who(b"") is None and who(b"Bearer") is None and who(b"Bearer ") is None
    assert who(b"Basic " + KEYS["lab"].encode()) is None and who(KEYS["lab"].encode()) is None
    assert who(b"Bearer " + TENANTS[0].key_sha256.encode()) is None, "who reads agent.toml has no key by that"
    assert who(bearer("shop"), bearer("shop")) is None and who(bearer("shop"), b"") is None, "two keys are none"


def test_a_user_id_does_where_no_key_was_sent() -> None:
    assert who(uid=1000) == "lab" and who(uid=0) == "lab" and who(uid=7) == "cron"
    assert who(uid=8) is None
    assert who(bearer("shop"), uid=7) == "shop" and who(b"Bearer x", uid=7) is None


@given(st.binary(max_size=200), st.lists(st.binary(max_size=80), max_size=3))
def test_nothing_else_is_anybody(value: bytes, values: list[bytes]) -> None:
    assert who(value) is None and who(b"Bearer " + value) is None
    assert not values or who(*values) is None


def test_keys_are_random_and_their_hash_is_sha256() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100 and all(len(key) >= 48 and key.isascii() and " " not in key for key in keys)
    key = keys.pop()
    assert key_sha256(key) == hashlib.sha256(key.encode()).hexdigest()


def test_models_that_a_tenant_sees() -> None:
    assert TENANTS[0].sees("a") and not TENANTS[0].sees("c") and TENANTS[1].sees("c")
    assert not Tenant(id="t", models=()).sees("a")


@given(st.integers(0, 2**32 - 1), st.one_of(st.none(), st.integers(0, 2**32 - 1)))
def test_a_ceiling_only_ever_lowers(asked: int, ceiling: int | None) -> None:
    def order(priority: int) -> tuple[bool, int]:  # as the queue has it: 1, 2, … and 0 after all of them
        return (priority == 0, priority)

    given_priority = Tenant(id="t", priority_ceiling=ceiling).priority(asked)
    assert order(given_priority) >= order(asked)
    if ceiling is None:
        assert given_priority == asked
    else:
        assert order(given_priority) == max(order(asked), order(ceiling))
