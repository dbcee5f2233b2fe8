"""A server that speaks HTTPS with a certificate of its own, and other machines may reach."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys

import httpx

from tests.api.tenants import make_key
from tests.serving import Server, free_port


def certificate(folder) -> tuple[str, str]:
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-keyout", key]
    named = ["-subj", "/CN=tinker.example", "-addext", "subjectAltName=DNS:localhost", "-out", cert]
    subprocess.run(["openssl", "req", "-x509", *made, *named], check=True, capture_output=True)
    return cert, key


def test_a_server_with_keys_and_a_certificate_is_for_everybody_on_the_network(tmp_path):
    cert, key = certificate(tmp_path)
    data_dir = tmp_path / "data"
    secret, _ = make_key(data_dir, "alice")
    tls = ("--set", f"tls_cert={cert}", "--set", f"tls_key={key}")
    server = Server(data_dir, "--host", "0.0.0.0", "--model", "tinkercloud/nano,lazy=true", *tls)
    server.url = f"https://localhost:{server.port}"
    trusted = ssl.create_default_context(cafile=cert)
    with contextlib.ExitStack() as stack:
        server.start(wait=False)
        stack.push(server)
        server.wait_until_ready(verify=trusted)
        sessions = f"{server.url}/api/v1/sessions"
        assert httpx.get(sessions, verify=trusted).status_code == 401
        mine = httpx.get(sessions, verify=trusted, headers={"X-API-Key": secret, "Host": "tinker.example"})
        assert mine.json() == {"sessions": []}
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TINKER")}
        environ |= {"TINKERCLOUD_DATA_DIR": str(data_dir), "TINKER_API_KEY": secret}

        def list_models(*options: str, **more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "tinkercloud", "models", "list", *options]
            return subprocess.run(command, capture_output=True, text=True, env=environ | more, timeout=60)

        assert "tinkercloud/nano" in list_models().stdout, "alice may not, whoever can read the data directory may"
        by_name = ("--url", server.url)
        assert "set SSL_CERT_FILE" in list_models(*by_name).stderr
        assert "tinkercloud/nano" in list_models(*by_name, SSL_CERT_FILE=cert).stdout
    (other := tmp_path / "other").mkdir()
    assert f"no server runs on {data_dir}" in list_models().stderr, "it has said that it stops"
    assert f"no server runs on {other}" in list_models(TINKERCLOUD_DATA_DIR=str(other)).stderr


def test_a_certificate_that_is_none_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "cert.pem").write_text("no certificate")
    tls = ("--set", f"tls_cert={tmp_path / 'cert.pem'}", "--set", f"tls_key={tmp_path / 'cert.pem'}")
    command = [sys.executable, "-m", "tinkercloud", "serve", "--port", str(free_port()), "--data-dir", str(tmp_path)]
    refused = subprocess.run([*command, *tls], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "PEM files" in refused.stderr and "Traceback" not in refused.stderr
