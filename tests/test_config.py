"""Where settings come from, what their errors say, and that the page about them is current."""

import json
import re
import runpy
from pathlib import Path

import pytest

from tinkercloud import config, nano
from tinkercloud.config import Settings
from tinkercloud.engine.base_model import EngineOptions
from tinkercloud.model_settings import ModelSettings, PerModel
from tinkercloud.setting_errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No settings from the machine that runs the tests, and a folder without any models in it."""
    for name in [name for name in __import__("os").environ if name.startswith(config.ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def toml(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "server.toml"
    file.write_text(text)
    return file


def test_command_line_wins_over_environment_over_file(monkeypatch, tmp_path):
    file = toml(tmp_path, "port = 1\nmax_rank = 1\ntoken_budget = 1")
    monkeypatch.setenv("TINKERCLOUD_PORT", "2")
    monkeypatch.setenv("TINKERCLOUD_MAX_RANK", "2")
    settings = Settings.load(config=file, port=3)
    assert (settings.port, settings.max_rank, settings.token_budget) == (3, 2, 1)


def test_the_file_may_be_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("TINKERCLOUD_CONFIG", str(toml(tmp_path, "port = 1234")))
    assert Settings.load().port == 1234


def test_without_models_the_embedded_one_is_served():
    options = Settings.load().engine_options(nano.NAME)
    assert options == EngineOptions(name=nano.NAME, source=str(nano.FOLDER))


def test_a_models_own_setting_wins_over_the_servers():
    settings = Settings.load(
        models=["a/b,max_rank=64,lazy=true", "c"], max_rank=8, max_context=512, kv_cache_bytes="1MiB"
    )
    first, second = settings.models
    assert (first.lazy, second.lazy) == (True, False)
    assert settings.engine_options("a/b") == EngineOptions(
        name="a/b", source="a/b", max_rank=64, max_context=512, kv_cache_bytes=2**20
    )
    assert settings.engine_options("c").max_rank == 8


def test_a_models_own_default_wins_too():
    """A model that asks for the default by name gets it, whatever the server's value is."""
    default = PerModel.model_fields["max_rank"].default
    settings = Settings.load(models=[f"a,max_rank={default}"], max_rank=8)
    assert settings.engine_options("a").max_rank == default


def test_every_engine_option_is_a_setting_with_the_same_default():
    defaults = EngineOptions(name=nano.NAME, source=str(nano.FOLDER))
    assert Settings.load().engine_options(nano.NAME) == defaults
    assert set(EngineOptions.__struct_fields__) - {"name", "source"} <= set(PerModel.model_fields)


def test_ways_to_write_a_model(tmp_path):
    folder = model_folder(tmp_path / "models" / "mine")
    odd = model_folder(tmp_path / "lr=0.1,b=2" / "m")
    settings = Settings.load(models=[str(folder), f"me/it={folder}", "models/mine", f"x={odd},max_rank=2", nano.NAME])
    assert [(model.name, model.source) for model in settings.models] == [
        ("mine", str(folder)),
        ("me/it", str(folder)),
        ("models/mine", str(folder)),
        ("x", str(odd)),
        (nano.NAME, "builtin"),
    ]
    assert settings.engine_options("x").max_rank == 2


def test_a_variant_has_the_files_of_its_model():
    settings = Settings.load(models=["Qwen/Qwen3-8B:peft:262144", "Qwen/Qwen3-8B/long"])
    assert {model.source for model in settings.models} == {"Qwen/Qwen3-8B"}


def test_models_from_file_and_environment(monkeypatch, tmp_path):
    folder = model_folder(tmp_path / "mine")
    file = toml(tmp_path, f'[[models]]\nname = "Qwen/Q"\n[[models]]\nname = "m"\nsource = "{folder}"\nmax_rank = 4')
    assert [model.source for model in Settings.load(config=file).models] == ["Qwen/Q", str(folder)]
    monkeypatch.setenv("TINKERCLOUD_MODELS", json.dumps(["a/b,lazy=true", {"name": "c", "max_rank": 3}]))
    assert [(model.name, model.lazy) for model in Settings.load(config=file).models] == [("a/b", True), ("c", False)]
    monkeypatch.setenv("TINKERCLOUD_MODELS", "d")
    assert [model.name for model in Settings.load(config=file).models] == ["d"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ["a=missing"]}, "there is no folder 'missing'"),
        ({"models": ["a=mine/config.json"]}, "model a=mine/config.json: 'mine/config.json' is a file; give the folder"),
        ({"models": ["./mine/config.json"]}, "model ./mine/config.json: 'mine/config.json' is a file; give the folder"),
        (
            {"models": ["a" * 201]},
            "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' ... (201 letters) is too long for a model's name",
        ),
        ({"models": ["a" * 10000]}, "(File name too long) nor the name of one, which has at most 200 letters"),
        ({"models": [f"a={'b' * 300}"]}, "(File name too long) nor the name of one, which has at most 200 letters"),
        ({"models": [f"{'a' * 201}=mine"]}, "is too long for a model's name, which has at most 200 letters"),
        ({"models": [{"name": "a", "source": f"{'a' * 101}/{'b' * 101}"}]}, "is too long for a model's name"),
        ({"models": ["~no-such-user/x"]}, "Could not determine home directory"),
        ({"models": ["empty"]}, "has no config.json"),
        ({"models": ["../x y"]}, "neither a folder nor a Hugging Face id"),
        ({"models": ["a/../b"]}, "neither a folder nor a Hugging Face id"),
        ({"models": ["../../etc=mine"]}, "cannot be a model's name"),
        ({"models": ["a", "a"]}, "two models are called a"),
        ({"models": ["a,max_rnk=3"]}, "did you mean 'max_rank'"),
        ({"models": ["a,max_rank=0"]}, "model a,max_rank=0: max_rank: Input should be greater than 0 (it is '0')"),
        ({"port": 70000}, "port: "),
        ({"tls_key": "k.pem"}, "tls_key is given without tls_cert"),
        ({"prot": 1}, "there is no setting 'prot'; did you mean 'port'?"),
        ({"dtype": "int4"}, "dtype: "),
        ({"quantization": "int4"}, "quantization: "),
        ({"poll_seconds": 50}, "poll_seconds: "),
        ({"config": "missing.toml"}, "missing.toml does not exist"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, given, said):
    (tmp_path / "empty").mkdir()
    model_folder(tmp_path / "mine")
    with pytest.raises(ConfigError, match=re.escape(said)):
        Settings.load(**given)


def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"^model a: there is no setting 'maxrank'; did you mean 'max_rank'\?$"):
        Settings.load(config=toml(tmp_path, '[[models]]\nname = "a"\nmaxrank = 3'))
    with pytest.raises(ConfigError, match=r"server\.toml is not TOML"):
        Settings.load(config=toml(tmp_path, "port 8000"))


def test_a_misspelt_variable_is_found():
    assert config.unknown_variables({"TINKERCLOUD_PROT": "1", "TINKERCLOUD_PORT": "1", "PORT": "1"}) == [
        ("TINKERCLOUD_PROT", "TINKERCLOUD_PORT")
    ]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_hosts_are_allowed(host):
    assert Settings.load(host=host).host == host


def test_the_page_is_current():
    made = runpy.run_path(str(ROOT / "scripts" / "make_configuration_doc.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run `make docs`"


def test_every_setting_is_described_and_used():
    declared = ("config.py", "model_settings.py", "base_model.py")
    source = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py") if file.name not in declared)
    for kind in (Settings, ModelSettings):
        for name, field in kind.model_fields.items():
            assert field.description and field.description.endswith("."), name
            assert re.search(rf"\.{name}\b", source), f"nothing reads {name}"
