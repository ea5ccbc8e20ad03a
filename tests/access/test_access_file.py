"""The access file: who is whom, and what is refused in words."""

from __future__ import annotations

import hashlib
import os
import pwd

import pytest

from blockdex.contract.access import Access, AccessError, Identity, Right
from blockdex.contract.errors import InvalidArgumentError, PermissionDeniedError, Reason

SHA = hashlib.sha256(b"secret").hexdigest()
ME = pwd.getpwuid(os.getuid()).pw_name


def test_every_kind_of_identity_becomes_a_tenant() -> None:
    access = Access.parse(f"""
        [[tokens]]
        sha256 = "{SHA.upper()}"
        tenant = "by-token"
        rights = ["operator"]
        [[certificates]]
        name = "engine.example"
        tenant = "by-certificate"
        [[users]]
        user = "{ME}"
        tenant = "by-user"
        [[groups]]
        group = 4321
        tenant = "by-group"
        [[groups]]
        group = 1234
        rights = ["metrics"]
    """)
    assert access.of_token("secret") == Identity("by-token", frozenset({Right.OPERATOR}))
    assert access.of_token("Secret") is None
    assert access.of_certificate(["other", "engine.example"]) == Identity("by-certificate")
    assert access.of_certificate(["engine.exampl"]) is None
    assert access.of_peer(os.getuid(), [4321]) == Identity("by-user")
    assert access.of_peer(77, [1, 1234, 4321]) == Identity("", frozenset({Right.METRICS}))
    assert access.of_peer(77, [1]) is None
    assert Access.parse("").of_token("") is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[tokens", "not TOML: "),
        ("[[token]]", "unknown table 'token', did you mean tokens?"),
        ("tokens = 3", r"tokens: must be a list of tables, each under \[\[tokens\]\]"),
        ("tokens = [3]", "tokens, entry 1: must be a table, got 3"),
        ("[[tokens]]\ntenant = 'a'", "tokens, entry 1: sha256 is missing"),
        ("[[tokens]]\nsha265 = 'a'", "tokens, entry 1: unknown field 'sha265', did you mean sha256?"),
        ("[[tokens]]\nsha256 = 'secret'\ntenant='a'", "sha256: must be 64 hexadecimal digits, got 6 characters"),
        (f"[[tokens]]\nsha256 = '{SHA}'", "tenant is missing, and there are no rights"),
        (f"[[tokens]]\nsha256 = '{SHA}'\ntenant = ''", "tenant: must have 1 to 256 characters, got 0"),
        (f"[[tokens]]\nsha256 = '{SHA}'\ntenant = 7", "tenant: must be a string, got 7"),
        (f"[[tokens]]\nsha256 = '{SHA}'\nrights = ['root']", "rights: must be of operator, metrics, got 'root'"),
        (f"[[tokens]]\nsha256 = '{SHA}'\nrights = 'operator'", "rights: must be a list of operator, metrics"),
        (2 * f"[[tokens]]\nsha256 = '{SHA}'\ntenant = 'a'\n", "tokens, entry 2: sha256: '.*' is there twice"),
        ("[[certificates]]\nname = ''\ntenant = 'a'", "certificates, entry 1: name: must be a name, got ''"),
        ("[[users]]\nuser = true\ntenant = 'a'", "users, entry 1: user: must be a name or a number, got True"),
        ("[[users]]\nuser = 'no such user'\ntenant = 'a'", "user: there is no 'no such user' on this machine"),
        ("[[groups]]\ngroup = 'no such group'\ntenant = 'a'", "group: there is no 'no such group' on this machine"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_entry_and_field(text: str, complaint: str) -> None:
    with pytest.raises(AccessError, match=complaint) as refused:
        Access.parse(text)
    assert "\n" not in str(refused.value)


def test_an_identity_calls_for_its_own_tenant_and_an_operator_for_any() -> None:
    engine, operator = Identity("mine"), Identity("", frozenset({Right.OPERATOR}))
    assert [engine.acting_for(named) for named in (None, "mine")] == ["mine", "mine"]
    assert operator.acting_for("mine") == "mine"
    for identity, named, reason in (
        (engine, "yours", Reason.WRONG_TENANT),
        (engine, "", Reason.WRONG_TENANT),
        (operator, None, Reason.MISSING_RIGHT),
        (Identity("", frozenset({Right.METRICS})), None, Reason.MISSING_RIGHT),
    ):
        with pytest.raises(PermissionDeniedError) as refused:
            identity.acting_for(named)
        assert refused.value.reason == reason
    with pytest.raises(InvalidArgumentError):
        operator.acting_for("")


def test_an_operator_may_read_metrics_and_one_who_reads_metrics_is_no_operator() -> None:
    reader, operator = Identity("", frozenset({Right.METRICS})), Identity("", frozenset({Right.OPERATOR}))
    assert [identity.has(Right.METRICS) for identity in (reader, operator, Identity("a"))] == [True, True, False]
    assert [identity.has(Right.OPERATOR) for identity in (reader, operator, Identity("a"))] == [False, True, False]
