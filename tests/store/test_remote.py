"""Artifacts behind URLs: the same machine, nothing left behind, and no server that sends more than it said."""

from __future__ import annotations

import errno
import gc
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from lightning_pathkernel import KernelMachine, KernelMachineExporter, verify
from lightning_pathkernel.store import download, file_table, remote
from tests.golden.make import Tiny, tumours
from tests.store.artifacts import MANIFEST, MIDDLE, edit, flip, names, refused

GOLDEN = Path(__file__).parents[1] / "golden" / "1.1" / "rows-16"
MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where downloads go, and nothing else; `memory://` is empty before and after."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    MEMORY.store.clear()
    MEMORY.pseudo_dirs[:] = [""]
    yield place
    MEMORY.store.clear()


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden"
    path.mkdir()
    for file in GOLDEN.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def put(directory: Path, url: str) -> str:
    """As a stranger does it: without a check."""
    for path in directory.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    return url


class Handler(SimpleHTTPRequestHandler):
    """Says nothing, and counts."""

    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def served(golden: Path) -> Iterator[tuple[str, list[str]]]:
    """URL of the golden artifact on a server of our own, and the paths that were asked of it."""
    asked: list[str] = []
    kind = type("Own", (Handler,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(golden.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/golden", asked
    server.shutdown()
    server.server_close()
    thread.join()


def answers(machine: KernelMachine) -> torch.Tensor:
    return machine.contributions(tumours()[0][32:])


# reading


def test_a_machine_in_memory_is_that_of_the_directory(temporary: Path) -> None:
    url = put(GOLDEN, "memory://bucket/machine")
    verify(url)
    assert names(temporary) == []
    machine = KernelMachine.load(url, Tiny())
    (kept,) = temporary.iterdir()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert torch.equal(answers(machine), answers(KernelMachine.load(GOLDEN, Tiny())))
    reduced = machine.without(machine.example_ids[:3])
    del machine
    assert answers(reduced).shape == (8, 29), "what is made of it keeps its files"
    del reduced
    gc.collect()
    assert names(temporary) == [], "they are deleted with the last machine that needs them"


def test_a_machine_on_a_server_is_that_of_the_directory(served: tuple[str, list[str]], temporary: Path) -> None:
    url, asked = served
    for given in (url, f"{url}/"):
        verify(given)
        machine = KernelMachine.load(given, Tiny())
        assert torch.equal(answers(machine), answers(KernelMachine.load(GOLDEN, Tiny())))
    assert {path.split("?")[0] for path in asked} == {f"/golden/{path.name}" for path in GOLDEN.iterdir()}
    asked.clear()
    verify(f"{url}?token=abc")
    assert set(asked) == {f"/golden/{path.name}?token=abc" for path in GOLDEN.iterdir()}


def test_a_file_url_is_the_directory(temporary: Path) -> None:
    verify(GOLDEN.as_uri())
    assert torch.equal(
        answers(KernelMachine.load(GOLDEN.as_uri(), Tiny())), answers(KernelMachine.load(GOLDEN, Tiny()))
    )
    assert names(temporary) == []


def test_damage_behind_a_url_is_named(golden: Path, temporary: Path) -> None:
    flip(golden / MIDDLE, 3000)
    url = put(golden, "memory://m")
    for ask in (verify, lambda u: KernelMachine.load(u, Tiny())):
        with refused(f"^{MIDDLE}: .*damaged or altered"):
            ask(url)
    with refused(r"^manifest\.json: sha256 [0-9a-f]{64}, 0{64} expected"):
        verify(url, "0" * 64)
    assert names(temporary) == []


def test_what_is_not_there_is_named(golden: Path, served: tuple[str, list[str]], temporary: Path) -> None:
    for url in ("memory://nothing", served[0] + "-else", "http://127.0.0.1:1/x"):
        with refused(r"is not a kernel machine: it has no manifest\.json"):
            verify(url)
    (golden / MIDDLE).unlink()
    for url in (served[0], put(golden, "memory://m")):
        with refused(f"^{MIDDLE}: cannot be read from .*FileNotFoundError"):
            verify(url)
    assert names(temporary) == []


def test_files_that_are_not_listed_are_named_where_they_can_be_seen(golden: Path) -> None:
    (golden / "more.txt").write_text("x")
    with refused(r"^more\.txt: not listed in manifest\.json"):
        verify(put(golden, "memory://m"))


@pytest.mark.parametrize("change", [-1, 1, 5 << 20])
def test_no_byte_beyond_what_the_manifest_lists_is_taken(
    change: int, golden: Path, served: tuple[str, list[str]], temporary: Path
) -> None:
    path = golden / "README.md"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    found = f"{len(data) - 1}" if change < 0 else f"more than {len(data)}"
    for url in (put(golden, "memory://m"), served[0]):
        with refused(rf"^README\.md: {found} bytes, {len(data)} expected: truncated or altered"):
            verify(url)
    assert names(temporary) == []


def test_more_than_the_disk_holds_is_refused_before_a_byte_of_it_is_taken(golden: Path, temporary: Path) -> None:
    edit(golden, lambda m: m["files"][MIDDLE].update(bytes=1 << 49))
    with refused(r"bytes, and \d+ are free in"):
        verify(put(golden, "memory://m"))
    assert names(temporary) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", "a\\b", "C:x", "", ".x", "memory://y", "a" * 200])
def test_no_name_from_a_manifest_leads_out_of_the_directory(name: str, golden: Path, temporary: Path) -> None:
    (golden / "x").write_text("")
    edit(golden, lambda m: m["files"].update({name: {"bytes": 0, "sha256": "0" * 64, "crc32c": ""}}))
    url = put(golden, "memory://deep/m")
    with MEMORY.open("/deep/x", "wb"):
        pass
    with refused("is not a plain file name"):
        verify(url)
    assert names(temporary) == []
    assert not (temporary.parent / "x").exists()


def test_a_manifest_without_end_is_refused(golden: Path, temporary: Path) -> None:
    (golden / MANIFEST).write_bytes(b" " * ((16 << 20) + 1))
    with refused(r"^manifest\.json: larger than 16777216 bytes"):
        verify(put(golden, "memory://m"))


def test_what_fsspec_lacks_is_said() -> None:
    with pytest.raises(ValueError, match="Protocol not known: nope"):
        verify("nope://x")
    with pytest.raises(ImportError, match="s3fs"):
        verify("s3://bucket/machine")


# writing


def test_a_machine_is_exported_to_a_url_its_manifest_last(
    recording: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = type(MEMORY).put_file
    monkeypatch.setattr(
        type(MEMORY), "put_file", lambda self, a, b, **k: (order.append(b.rpartition("/")[2]), real(self, a, b, **k))[1]
    )
    url = "memory://bucket/machine"
    exporter = KernelMachineExporter(recording)
    assert exporter.export(url) == url
    assert order[-1] == MANIFEST
    local = exporter.export(tmp_path / "local")
    assert sorted(order) == names(local)
    assert all(MEMORY.cat_file(f"/bucket/machine/{p.name}") == p.read_bytes() for p in local.iterdir())
    verify(url)
    before = {path: MEMORY.cat_file(path) for path in MEMORY.find("/")}
    with pytest.raises(FileExistsError, match="memory://bucket/machine exists and is not empty"):
        exporter.export(url)
    assert {path: MEMORY.cat_file(path) for path in MEMORY.find("/")} == before
    assert names(temporary) == []


@pytest.mark.parametrize("at", range(7))
def test_an_upload_that_breaks_off_leaves_nothing_and_shows_no_machine_on_the_way(
    at: int, recording: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, real = [0], type(MEMORY).put_file

    def fails(self: object, a: str, b: str, **options: object) -> None:
        with refused(r"it has no manifest\.json"):
            verify("memory://m")
        if count[0] == at:
            raise OSError(errno.EIO, "the line is down")
        count[0] += 1
        real(self, a, b, **options)

    monkeypatch.setattr(type(MEMORY), "put_file", fails)
    exporter = KernelMachineExporter(recording)
    with pytest.raises(OSError, match="the line is down"):
        exporter.export("memory://m")
    assert MEMORY.find("/") == []
    assert names(temporary) == []
    monkeypatch.setattr(type(MEMORY), "put_file", real)
    exporter.export("memory://m")
    verify("memory://m")


def test_a_url_of_a_directory_is_written_to_by_a_rename(recording: Path, tmp_path: Path) -> None:
    out = KernelMachineExporter(recording).export((tmp_path / "out").as_uri())
    assert out == tmp_path / "out"
    verify(out)


def test_nothing_is_downloaded_for_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_located", lambda url: pytest.fail("fsspec was asked"))
    verify(GOLDEN)
    KernelMachine.load(GOLDEN, Tiny())
    assert isinstance(file_table(GOLDEN), dict)
    with pytest.raises(pytest.fail.Exception):
        download("memory://m")
