"""What tinker_gmi adds to the SDK and what it leaves alone, in an environment where pip has installed it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

HOSTED = "https://tinker.thinkingmachines.dev/services/tinker-prod"
OWN = "http://127.0.0.1:1"

REFUSALS = """
import warnings; warnings.simplefilter("ignore")
import tinker

def refusal(base_url, api_key, *arguments, **named):
    try:
        tinker.ServiceClient(base_url=base_url, api_key=api_key).create_lora_training_client(*arguments, **named)
    except Exception as error:
        print(type(error).__name__, error)
"""


def lines(done):
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_nothing_is_imported_before_tinker_is(run):
    program = (
        "import sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('tinker', 'tinker_gmi', 'httpx')))"
    )
    assert lines(run(program)) == ["['tinker_gmi']"]


def test_a_submodule_imported_first_is_enough(run):
    program = (
        "from tinker.types import OptimStepResponse as R; print(R(metrics={'learning_rate:mean': .5}).learning_rates)"
    )
    assert lines(run(program)) == ["[0.5]"]


def test_step_without_the_metric_has_no_learning_rates(run):
    program = "import tinker; print(hasattr(tinker.OptimStepResponse(metrics={'x:mean': 1.0}), 'learning_rates'))"
    assert lines(run(program)) == ["False"]


def test_official_errors_of_wrong_arguments(run):
    program = f"""{REFUSALS}
refusal({OWN!r}, "k")
refusal({OWN!r}, "k", "m", model_name="m")
refusal({OWN!r}, "k", model_name="m", base_model="m")
refusal({OWN!r}, "k", "m", ranks=3)
"""
    name = "TypeError ServiceClient.create_lora_training_client()"
    assert lines(run(program)) == [
        f"{name} missing 1 required positional argument: 'base_model'",
        f"{name} got an unexpected keyword argument 'model_name'",
        f"{name} got an unexpected keyword argument 'model_name'",
        f"{name} got an unexpected keyword argument 'ranks'",
    ]


def test_the_hosted_service_is_as_the_sdk_has_it(run):
    """No alias, no key of another form, no default key: each is refused before anything is sent."""
    program = f"""{REFUSALS}
refusal({HOSTED!r}, "slime-dev-key", "m")
refusal({HOSTED!r}, "tml-key", model_name="m")
refusal({HOSTED!r}, None, "m")
refusal(None, "slime-dev-key", "m")
"""
    prefix, alias, missing, default = lines(run(program))
    assert prefix == default == "TinkerError The api_key must start with the 'tml-' prefix"
    assert alias.startswith("TypeError")
    assert missing.startswith("TinkerError The api_key client option must be set")


def test_the_header_is_for_other_servers_only(run):
    """Looks at the headers of the client that would send the first request, and stops there."""
    marked = {HOSTED: False, "https://thinkingmachines.dev.example.org": True, "http://localhost:8000": True}
    program = f"""
from tinker.lib.internal_client_holder import InternalClientHolder as Holder
import tinker
class Stop(Exception): pass
def fetch(holder, auth):
    print("X-Tinker-GMI" in holder._constructor_kwargs["default_headers"])
    raise Stop
Holder._fetch_client_config = fetch
for base_url in {list(marked)!r}:
    try:
        tinker.ServiceClient(base_url=base_url, api_key="tml-key").create_lora_training_client("m")
    except Stop:
        pass
"""
    assert lines(run(program)) == [str(is_marked) for is_marked in marked.values()]


class Recorder(BaseHTTPRequestHandler):
    """Notes the headers of each request and refuses it, for good."""

    seen: list[dict[str, str]] = []

    def do_POST(self):
        self.seen.append(dict(self.headers))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"detail": "no"}).encode() if self.path.endswith("create_session") else b"{}"
        self.send_response(400 if self.path.endswith("create_session") else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *arguments):
        pass


KEYS = [
    ("slime-dev-key", "", "slime-dev-key"),
    ("tml-mine", "other", "tml-mine"),
    (None, "any-key", "any-key"),
    (None, "", "tml-no-key"),
]
"""The argument, the environment variable, and what is sent."""


def test_keys_and_header_on_the_wire(run):
    Recorder.seen = []
    program = f"""
import os, tinker
for argument, variable, _ in {KEYS!r}:
    os.environ["TINKER_API_KEY"] = variable
    try:
        tinker.ServiceClient(api_key=argument).create_sampling_client(base_model="m")
    except tinker.BadRequestError:
        print(argument, variable)
"""
    with HTTPServer(("127.0.0.1", 0), Recorder) as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        done = run(program, TINKER_BASE_URL=f"http://127.0.0.1:{recorder.server_port}")
        recorder.shutdown()
    assert lines(done) == [f"{argument} {variable}" for argument, variable, _ in KEYS]
    headers = [{name.lower(): value for name, value in request.items()} for request in Recorder.seen]
    sent = [request["x-api-key"] for request in headers]
    assert list(dict.fromkeys(sent)) == [key for _, _, key in KEYS]
    assert min(sent.count(key) for _, _, key in KEYS) >= 3, "two configurations and the session"
    assert {request["x-tinker-gmi"] for request in headers} == {"1"}
