import time

import jwt
import pytest
from tinker.lib._jwt_auth import jwt_claims

from tinkercloud.api import tokens
from tinkercloud.ledger.records import KeyRecord


def key(**fields) -> KeyRecord:
    given = {"key_id": 7, "digest": "d", "hint": "tml-", "owner": "alice", "name": "n", "is_operator": False}
    return KeyRecord(**given | {"created_at": 1.0} | fields)


def test_the_sdk_reads_the_token_and_it_is_signed(tmp_path):
    token = tokens.issue("alice", key(), tmp_path / "data")
    claims = jwt_claims(token)
    assert {"sub", "org_id", "email", "iat", "exp"} <= claims.keys()
    assert claims["exp"] - claims["iat"] == tokens.TOKEN_SECONDS
    secret = (tmp_path / "data" / "token.secret").read_bytes()
    assert jwt.decode(token, secret, algorithms=["HS256"])["sub"] == "alice"
    assert tokens.read(token, tmp_path / "data")["key_id"] == 7


def test_a_token_does_not_outlive_its_key(tmp_path):
    ends = int(time.time()) + 5
    assert jwt_claims(tokens.issue("alice", key(expires_at=ends + 0.5), tmp_path))["exp"] == ends


@pytest.mark.parametrize("attack", ["another secret", "no signature", "no time limit", "rubbish"])
def test_what_is_not_the_servers_token_is_refused(tmp_path, attack):
    claims = {"sub": "alice", "key_id": 7, "exp": time.time() + 60}
    token = {
        "another secret": lambda: jwt.encode(claims, b"x" * 32, algorithm="HS256"),
        "no signature": lambda: jwt.encode(claims, None, algorithm="none"),
        "no time limit": lambda: jwt.encode({"sub": "alice"}, tokens.secret(tmp_path), algorithm="HS256"),
        "rubbish": lambda: "eyJ.eyJ.x",
    }[attack]()
    with pytest.raises(tokens.TokenRefused, match="not one of this server"):
        tokens.read(token, tmp_path)


def test_the_secret_is_made_once_for_a_data_directory_and_is_private(tmp_path):
    assert tokens.issue_operators(tmp_path) is None, "no server has been here"
    tokens.issue("local", None, tmp_path)
    path = tmp_path / "token.secret"
    secret = path.read_bytes()
    tokens.secret.cache_clear()
    tokens.issue("local", None, tmp_path)
    assert path.read_bytes() == secret and len(secret) == 32
    assert path.stat().st_mode & 0o077 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["token.secret"]
    claims = tokens.read(tokens.issue_operators(tmp_path), tmp_path)
    assert claims["operator"] and claims["exp"] - claims["iat"] == tokens.OPERATOR_SECONDS


def test_a_secret_that_was_cut_short_signs_nothing(tmp_path):
    (tmp_path / "token.secret").touch()
    for sign in (lambda: tokens.issue("local", None, tmp_path), lambda: tokens.issue_operators(tmp_path)):
        with pytest.raises(tokens.UnusableSecret, match=r"token\.secret has 0 bytes.*remove it"):
            sign()
