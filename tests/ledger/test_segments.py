from __future__ import annotations

from pathlib import Path

import pytest

from tests.disks import durable
from tinkercloud.ledger.files import make_private
from tinkercloud.ledger.segments import Blob, Corrupt, SegmentWriter, read


def test_blobs_come_back_as_they_were_over_several_files(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, segment_bytes=1000)
    contents = [bytes([n]) * (n * 37) for n in range(1, 40)]
    blobs = [writer.append(data) for data in contents]
    writer.sync()
    assert [read(tmp_path, blob) for blob in blobs] == contents
    assert len(list(tmp_path.iterdir())) == blobs[-1].segment > 5
    writer.close()


@pytest.mark.parametrize("place", [0, 8, 12, 50])
def test_a_changed_byte_is_an_error_that_names_the_file(tmp_path: Path, place: int) -> None:
    writer = SegmentWriter(tmp_path)
    blob = writer.append(b"x" * 100)
    writer.close()
    (file,) = tmp_path.iterdir()
    stored = bytearray(file.read_bytes())
    stored[place] ^= 1
    file.write_bytes(stored)
    with pytest.raises(Corrupt, match=file.name):
        read(tmp_path, blob)


def test_a_short_or_missing_file_is_an_error(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path)
    blob = writer.append(b"x" * 100)
    writer.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Corrupt):
        read(tmp_path, blob)
    with pytest.raises(Corrupt, match="missing"):
        read(tmp_path, Blob(7, 0, 100))


def test_a_torn_tail_is_left_alone(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path)
    before = writer.append(b"before")
    writer.close()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b"half of a blob")
    writer = SegmentWriter(tmp_path)
    after = writer.append(b"after")
    writer.close()
    assert read(tmp_path, before) == b"before"
    assert read(tmp_path, after) == b"after"


def test_rewinding_gives_space_back_also_over_several_files(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, segment_bytes=100)
    kept = writer.append(b"kept")
    start = writer.position()
    for _ in range(5):
        writer.append(b"x" * 90)
    writer.rewind(start)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [start[1]]
    next_one = writer.append(b"next")
    assert (next_one.segment, next_one.offset) == start
    assert (read(tmp_path, kept), read(tmp_path, next_one)) == (b"kept", b"next")
    writer.close()


def test_a_power_cut_does_not_take_the_folder_of_what_was_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = durable(monkeypatch)
    make_private(tmp_path / "data")
    SegmentWriter(tmp_path / "data" / "segments").close()
    for name in ("data", "data/segments", "data/segments/00000001.seg"):
        place = tmp_path / name
        assert place.exists() and place.name in kept[str(place.parent)]
