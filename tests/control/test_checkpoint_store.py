"""Checkpoints in a folder and in S3, by the same tests: published whole or not at all, read as they were written."""

import hashlib
import json

import pytest

from tests import s3 as moto
from tests.control.stores import KEY, files_of
from tinkercloud.cli import doctor
from tinkercloud.config import Settings
from tinkercloud.control.checkpoint_store import CheckpointStore, StoreUnavailable, UnusableStore
from tinkercloud.control.store_owner import StoreOwner, without_userinfo
from tinkercloud.errors import InvalidRequest, NotFound


def test_what_was_put_is_got(store_url, us, saved_folder, tmp_path):
    store = CheckpointStore(store_url, us)
    store.put(saved_folder, KEY)
    target = tmp_path / "cache" / "it"
    store.get(KEY, target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        file.name: file.read_bytes() for file in saved_folder.iterdir()
    }
    assert store.keys() == {KEY} and store.damage(KEY) is None
    store.remove(KEY)
    store.remove(KEY)
    assert store.keys() == set()
    with pytest.raises(NotFound, match="nothing at"):
        store.get(KEY, tmp_path / "cache" / "gone")
    assert store.damage(KEY) == f"it is missing at {store_url}"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["it"], "no draft stays"


def test_files_without_their_manifest_are_no_checkpoint(store_url, us, saved_folder, tmp_path, monkeypatch):
    store = CheckpointStore(store_url, us)
    store.put(saved_folder, KEY)

    def cut(*arguments, **options):
        raise OSError("the connection was cut")

    with monkeypatch.context() as cutting:
        cutting.setattr(store._fs, "put_file", cut)
        with pytest.raises(StoreUnavailable, match="the connection was cut"):
            store.put(saved_folder, KEY)
    with pytest.raises(NotFound):
        store.get(KEY, tmp_path / "it")
    assert store.keys() == {KEY}, "a sweep finds what there is"
    store.put(saved_folder, KEY)
    store.get(KEY, tmp_path / "it")


def test_what_the_store_has_changed_is_refused(store_url, us, saved_folder, tmp_path):
    store = CheckpointStore(store_url, us)
    store.put(saved_folder, KEY)
    files, root = files_of(store_url)
    weights = f"{root}/{KEY}/adapter_model.safetensors"
    files.pipe_file(weights, b"x" + files.cat_file(weights)[1:])
    with pytest.raises(InvalidRequest, match=r"adapter_model\.safetensors .* is not what was written"):
        store.get(KEY, tmp_path / "it")
    assert "adapter_model.safetensors is damaged" in store.damage(KEY)
    files.pipe_file(f"{root}/{KEY}/manifest.json", b'{"files": 3}')
    with pytest.raises(InvalidRequest, match="manifest"):
        store.get(KEY, tmp_path / "it")
    of = json.dumps({"size": len("{}"), "sha256": hashlib.sha256(b"{}").hexdigest()})
    files.pipe_file(f"{root}/{KEY}/../elsewhere" if store._is_local else f"{root}/{KEY}/x", b"{}")
    files.pipe_file(f"{root}/{KEY}/manifest.json", f'{{"files": {{"../elsewhere": {of}}}}}'.encode())
    with pytest.raises(InvalidRequest, match="manifest"):
        store.get(KEY, tmp_path / "it")
    assert not (tmp_path / "it").exists() and not (tmp_path / "elsewhere").exists()


def test_a_store_belongs_to_one_data_directory(store_url, us, saved_folder, tmp_path):
    CheckpointStore(store_url, us).put(saved_folder, KEY)
    ours = StoreOwner(tmp_path / "us").id
    assert ours == us.id
    other = CheckpointStore(store_url, StoreOwner(tmp_path))
    for change in (lambda: other.put(saved_folder, KEY), lambda: other.remove(KEY), other.claim):
        with pytest.raises(UnusableStore, match=f"another data directory .*{ours}.*owner.json"):
            change()
    other.get(KEY, tmp_path / "it")
    assert other.check() is None


def test_a_store_that_cannot_be_used_is_said(tmp_path, s3_server, monkeypatch):
    moto.use(monkeypatch, s3_server)
    with pytest.raises(UnusableStore, match="nowhere"):
        CheckpointStore("nowhere://bucket")
    with pytest.raises(UnusableStore, match="pip install"):
        CheckpointStore("gs://bucket")
    assert "no-such-bucket" in CheckpointStore("s3://no-such-bucket/x").check()
    (tmp_path / "file").touch()
    assert "cannot be used now" in CheckpointStore(f"file://{tmp_path}/file/x").check()


def test_a_disk_that_is_not_mounted_is_no_new_store(us, saved_folder, tmp_path):
    url, disk = f"file://{tmp_path}/store", tmp_path / "store"
    CheckpointStore(url, us).put(saved_folder, KEY)
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    for store in (CheckpointStore(url, us), CheckpointStore(url, StoreOwner(tmp_path / "us"))):
        uses = (
            lambda: store.put(saved_folder, KEY),
            lambda: store.remove(KEY),
            lambda: store.get(KEY, tmp_path / "it"),
        )
        for use in (*uses, store.claim, lambda: store.damage(KEY), lambda: CheckpointStore(url).damage(KEY)):
            with pytest.raises(StoreUnavailable, match="mounted"):
                use()
        assert "mounted" in store.check()
    assert list(disk.iterdir()) == []
    disk.rmdir()
    (tmp_path / "unmounted").rename(disk)
    store.get(KEY, tmp_path / "it")
    emptied = tmp_path / "emptied"
    emptied.mkdir()
    (disk / "owner.json").rename(emptied / "owner.json")
    CheckpointStore(url, StoreOwner(emptied)).claim()
    with pytest.raises(StoreUnavailable, match="another data directory's now"):
        store.put(saved_folder, KEY)
    (disk / "owner.json").unlink()
    with pytest.raises(StoreUnavailable) as refused:
        store.put(saved_folder, KEY)
    (disk / "owner.json").write_text(str(refused.value).partition("must hold ")[2])
    store.put(saved_folder, KEY)


def test_a_torn_owner_is_said(store_url, us, saved_folder):
    store = CheckpointStore(store_url, us)
    store.claim()
    files, root = files_of(store_url)
    assert [path.split("/")[-1] for path in files.find(root)] == ["owner.json"]
    files.pipe_file(f"{root}/owner.json", b'{"data')
    with pytest.raises(UnusableStore, match=r"owner\.json is damaged"):
        store.put(saved_folder, KEY)


def test_nobody_is_told_a_password():
    for url in ("nowhere://me:se@cret@host/x", "ftp://me:se@cret@127.0.0.1:1/x"):
        with pytest.raises(UnusableStore) as refused:
            CheckpointStore(url)
        assert "cret" not in str(refused.value) and url.split("@")[-1] in str(refused.value)
    store = CheckpointStore("memory://me:secret@host/x")
    store._fs.cat_file = lambda path: (_ for _ in ()).throw(OSError("no memory://me:secret@host/x"))
    with pytest.raises(StoreUnavailable, match=r"^memory://host/x .* no memory://host/x$"):
        store.get(KEY, None)
    assert without_userinfo("s3://bucket/a@b and file:///c/d@e") == "s3://bucket/a@b and file:///c/d@e"


def test_doctor_tries_the_store(store_url, tmp_path):
    (check,) = [
        one
        for one in doctor.storage(Settings.load(data_dir=tmp_path, checkpoints_url=store_url))
        if "check" in one.name
    ]
    assert check.ok and store_url in check.found
    files, root = files_of(store_url)
    assert files.find(root) == []
    wrong = Settings.load(data_dir=tmp_path, checkpoints_url="nowhere://x")
    (check,) = [one for one in doctor.storage(wrong) if "check" in one.name]
    assert not check.ok and "nowhere" in check.found and "leave it out" in check.mend
