"""Random bodies for every POST route: never a 5xx, always JSON, and the server trains on."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as pb

from tests.e2e.by_hand import GOOD, NANO, SOUND, Run
from tests.fuzzing import fuzzing
from tests.serving import Server
from tinkercloud.api.app import create_app
from tinkercloud.config import Settings

HEADERS = [
    {},
    {"content-type": "application/json"},
    {"content-type": "application/x-protobuf"},
    {"content-type": "application/json; charset=latin-1"},
    {"content-type": "multipart/form-data"},
    {"content-encoding": "zstd"},
    {"content-encoding": "gzip"},
    {"content-encoding": "zstd, zstd"},
    {"x-tinker-gmi": "1"},
]
DESCRIBED = create_app(None, Settings.load()).openapi()  # type: ignore[arg-type]
ROUTES = sorted(path for path, methods in DESCRIBED["paths"].items() if "post" in methods)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded model with polls that are hardly held; nothing is looked for on a hub."""
    data_dir = tmp_path_factory.mktemp("fuzz") / "data"
    limits = ("--set", "poll_seconds=0.05", "--set", "max_body_bytes=100000", "--set", "max_decompressed_bytes=1000000")
    with Server(data_dir, *limits, HF_HUB_OFFLINE="1") as running:
        yield running
        assert "crashed" not in running.log.read_text()


@pytest.fixture(scope="module")
def run(server):
    made = Run(server.url)
    yield made
    made.close()


@pytest.fixture
def victim(server):
    made = Run(server.url)
    yield made
    made.close()


def survives(answer):
    assert answer.status_code < 500, answer.text
    assert answer.headers["content-type"] in ("application/json", "application/x-protobuf")
    if answer.status_code not in (200, 408):
        body = answer.json()
        assert isinstance(body["detail"], str) and body["detail"]


def names_in(path: str) -> list[str]:
    """The fields that the body of a route has, as far as two levels down."""
    content = DESCRIBED["paths"][path]["post"].get("requestBody", {}).get("content", {})
    schemas = DESCRIBED["components"]["schemas"]
    names, todo = {"type"}, [content.get("application/json", {}).get("schema", {})]
    for schema in todo[:50]:
        text = json.dumps(schema)
        for name, other in schemas.items():
            if f'schemas/{name}"' in text and other not in todo:
                todo.append(other)
                names |= other.get("properties", {}).keys()
    return sorted(names)


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10),
    st.sampled_from([2**31, 2**53, 2**63, -(2**63) - 1, 10**400]),
    st.floats(),
    st.text(st.characters(codec=None), max_size=6),
    st.sampled_from(["cross_entropy", "encoded_text", "int64", "float32", "snapshot", NANO, "../x", "\ud800", "\0"]),
)


def values(names: list[str]) -> st.SearchStrategy:
    """JSON that knows the names of fields, and is deeper than it should be."""
    leaves = PLAIN | st.lists(st.integers(0, 5), max_size=4)
    keys = st.sampled_from(names) | st.text()
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
    )


@st.composite
def changed(draw, body, names: list[str]):
    """A sound body of which one part, however deep, is something else."""
    if isinstance(body, dict) and body and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(body)))
        return body | {key: draw(changed(body[key], names))}
    if isinstance(body, list) and body and draw(st.integers(0, 9)):
        place = draw(st.integers(0, len(body) - 1))
        return [*body[:place], draw(changed(body[place], names)), *body[place + 1 :]]
    return draw(values(names))


@pytest.mark.parametrize("path", ROUTES)
def test_random_json(run, victim, path):
    route, names = path.removeprefix("/api/v1/"), names_in(path)
    mine = {"model_id": victim.id, "session_id": victim.session, "request_id": f"{victim.id}:0"}
    sound = {name: mine.get(name, value) for name, value in SOUND.get(route, {}).items() if name != "seq_id"}
    anything = st.dictionaries(st.sampled_from(names), values(names), max_size=6) | values(names)

    @fuzzing(40)
    @given(changed(sound, names) | anything, st.sampled_from(HEADERS))
    def send(body, headers):
        survives(victim.http.post(route, content=json.dumps(body), headers=headers))

    send()
    run.trains_on()


@schemathesis.openapi.from_dict(DESCRIBED).parametrize()
@settings(fuzzing(5), phases=[Phase.generate], suppress_health_check=list(HealthCheck))
def test_whatever_the_description_allows(case, server):
    answer = case.call(base_url=server.url, timeout=60, allow_redirects=False)
    assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.text}"
    if answer.status_code >= 400:
        assert answer.json()["detail"]


def test_random_bytes(run, victim):
    @fuzzing(100)
    @given(st.sampled_from(ROUTES), st.binary(max_size=60), st.sampled_from(HEADERS))
    def send(path, body, headers):
        survives(victim.http.post(path.removeprefix("/api/v1/"), content=body, headers=headers))

    send()
    run.trains_on()


@st.composite
def mutated(draw, body: bytes) -> bytes:
    """A body with a few bytes changed, removed or added."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        end = min(len(body), start + draw(st.integers(0, 8)))
        body = body[:start] + draw(st.binary(max_size=8)) + body[end:]
    return body


def test_damaged_protobuf(run, victim):
    sound = victim.message(GOOD, seq_id=1).SerializeToString()

    @fuzzing(300)
    @given(mutated(sound), st.sampled_from([*HEADERS[-4:], {}]))
    def send(body, headers):
        survives(victim.send(body, **headers))

    send()
    run.trains_on()


INTEGERS = st.integers(-3, 5) | st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1])
PARTS = st.binary(max_size=24) | st.builds(bytes, st.sampled_from([0, 4, 8, 16, 32]))


@st.composite
def tensors(draw) -> pb.Tensor:
    tensor = pb.Tensor(dtype=draw(st.integers(0, 6)), shape=draw(st.lists(INTEGERS, max_size=3)))
    if draw(st.booleans()):
        tensor.dense = draw(PARTS)
    else:
        tensor.sparse_csr.values = draw(PARTS)
        tensor.sparse_csr.crow_indices = draw(PARTS)
        tensor.sparse_csr.col_indices = draw(PARTS)
    return tensor


@st.composite
def messages(draw, model_id: str) -> pb.ForwardBackwardRequest:
    """Sound protobuf that says anything."""
    message = pb.ForwardBackwardRequest(
        model_id=draw(st.sampled_from([model_id, "", "x"])),
        seq_id=draw(st.integers(-3, 40) | st.just(2**31 - 1)),
        loss_fn=draw(st.sampled_from(["cross_entropy", "ppo", "importance_sampling", "stable_reinforce", "", "x"])),
        forward_only=draw(st.booleans()),
        loss_fn_config=draw(st.dictionaries(st.sampled_from(["clip_low_threshold", "x"]), st.floats(), max_size=1)),
    )
    for _ in range(draw(st.integers(0, 2))):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = draw(PARTS)
        if draw(st.integers(0, 9)) == 0:
            datum.model_input.add().image.data = b"x"
        for name in draw(st.sets(st.sampled_from(["target_tokens", "weights", "logprobs", "advantages"]))):
            datum.loss_fn_inputs[name].CopyFrom(draw(tensors()))
        for spans in (datum.model_input_spans, datum.loss_fn_input_spans):
            for kind in draw(st.lists(st.sampled_from(["prompt_tokens", "sampled_tokens", None]), max_size=2)):
                span = spans.add()
                if kind is not None:
                    place = getattr(span, kind)
                    place.sequence_id = draw(st.sampled_from(["", "x", f"{model_id}:0:0", "\0:0", ":"]))
                    place.offset, place.length = draw(INTEGERS), draw(INTEGERS)
    return message


def test_senseless_protobuf(run, victim):
    statuses = set()

    @fuzzing(300)
    @given(messages(victim.id), st.sampled_from([{}, {"x-tinker-gmi": "1"}]))
    def send(message, headers):
        answer = victim.send(message, **headers)
        statuses.add(answer.status_code)
        survives(answer)

    send()
    assert statuses >= {200, 400, 404}
    run.trains_on()


def test_addresses_of_every_kind(run):
    for path in ["", "/", "//", "/%00", "/%ff", "/..%2f..%2fetc", "/sessions/%2e%2e", "/samplers/" + "x" * 5000,
                 "/training_runs/%ED%A0%80/checkpoints", "/sessions?limit=NaN", "/checkpoints?offset=" + "9" * 30,
                 "/training_runs?limit=1&limit=x"]:  # fmt: skip
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            survives(run.http.request(method, f"{run.url}/api/v1{path}"))
    run.trains_on()
