import jwt
import pytest
from tinker.lib._jwt_auth import jwt_claims

from tinkercloud.api.auth import TOKEN_SECONDS, issue_token


def test_the_sdk_reads_the_token_and_it_is_signed(tmp_path):
    token = issue_token("local", tmp_path / "data")
    claims = jwt_claims(token)
    assert {"sub", "org_id", "email", "iat", "exp"} <= claims.keys()
    assert claims["exp"] - claims["iat"] == TOKEN_SECONDS
    secret = (tmp_path / "data" / "token.secret").read_bytes()
    assert jwt.decode(token, secret, algorithms=["HS256"])["sub"] == "local"
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(token, b"x" * 32, algorithms=["HS256"])


def test_the_secret_is_made_once_for_a_data_directory_and_is_private(tmp_path):
    issue_token("local", tmp_path)
    path = tmp_path / "token.secret"
    secret = path.read_bytes()
    issue_token("local", tmp_path)
    assert path.read_bytes() == secret and len(secret) == 32
    assert path.stat().st_mode & 0o077 == 0
    assert [file.name for file in tmp_path.iterdir()] == ["token.secret"]
