"""Fits that break off, and disks that fill up: what is left can be exported, and goes as far as it can."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pathkernel import KernelMachine, KernelMachineExporter, PathKernelCallback, verify
from lightning_pathkernel.store import ArtifactError, StoreError, WriterLock, segments, writer
from tests.helpers import Classifier, digits
from tests.resuming import StopAfter, files_of, loaders, run, trainer_for


def adamw() -> Classifier:
    torch.manual_seed(3)
    return Classifier("adamw", weight_decay=0.1)


def weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Breaks(pl.Callback):
    """Raises, and keeps the weights as they are then."""

    def __init__(self, hook: str, batch: int, error: Callable[[], BaseException]) -> None:
        self.seen, self.found = 0, {}

        def fails(trainer: Any, module: Any, *args: Any) -> None:
            self.seen += 1
            if self.seen == batch:
                self.found = weights(module)
                raise error()

        setattr(self, hook, fails)


def exported(recording: Path, out: Path) -> KernelMachine:
    found = KernelMachineExporter(recording).export(out)
    verify(found)
    return KernelMachine.load(found, adamw())


HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
         "on_train_batch_end", "on_train_epoch_end", "on_validation_start"]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_anywhere_leaves_the_path_up_to_the_last_step(hook: str, tmp_path: Path) -> None:
    breaks = Breaks(hook, 1 if "epoch" in hook or "valid" in hook else 6, lambda: RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        run(tmp_path, adamw, {}, {}, [breaks])
    steps = 6 if hook in HOOKS[4:] else 5
    machine = exported(tmp_path / "run" / "recording", tmp_path / "out")
    assert machine.chords[-1].last_step == steps
    for name, value in machine.chords[-1].weights(1.0).items():
        torch.testing.assert_close(value, breaks.found[name], rtol=0, atol=1e-7, msg=f"{name} is not as it was")
    assert machine.fidelity([digits()[1].tensors[0]])["fidelity"] > 0.9
    assert not [t for t in threading.enumerate() if t.name == "pathkernel-writer"]


@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_batch_start"])
def test_an_interrupt_by_hand_does_the_same(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path, adamw, {}, {}, [Breaks(hook, 9, KeyboardInterrupt)])
    finally:
        signal.signal(signal.SIGINT, before)
    machine = exported(tmp_path / "run" / "recording", tmp_path / "out")
    assert machine.chords[-1].last_step == 8


def test_a_checkpoint_on_an_exception_can_be_resumed(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", adamw, {}, {})
    root = tmp_path / "broken"
    saver = pl.callbacks.OnExceptionCheckpoint(root, "on_exception")
    breaks = Breaks("on_before_backward", 9, lambda: RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        run(root, adamw, {}, {"enable_checkpointing": True}, [breaks, saver])
    # this loader does not give the batch in progress a second time: the epoch is one step shorter
    again = run(root, adamw, {}, {}, checkpoint=root / "on_exception.ckpt")
    found = KernelMachine.load(again.machine_dir, adamw())
    expected = KernelMachine.load(whole.machine_dir, adamw())
    assert [c.last_step for c in found.chords][:-1] == [c.last_step for c in expected.chords][:-1]
    assert found.chords[-1].last_step == 17
    verify(again.machine_dir)


def test_an_export_before_the_first_step_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        run(tmp_path, adamw, {}, {}, [Breaks("on_before_backward", 1, lambda: RuntimeError("mine"))])
    with pytest.raises(ArtifactError, match="has no closed chord yet: nothing was learned that could be exported"):
        KernelMachineExporter(tmp_path / "run" / "recording").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.test_interrupted import adamw, Breaks
from tests.resuming import StopAfter, run
import pytorch_lightning as pl

class Dies(pl.Callback):
    def __init__(self): self.seen = 0
    def on_train_batch_start(self, *args):
        self.seen += 1
        if self.seen == 12: os.kill(os.getpid(), signal.SIGKILL)

root = Path(sys.argv[1])
also = {} if sys.argv[2] == "none" else {int(sys.argv[2]): root / "at.ckpt"}
run(root, adamw, {"nodes": 3}, {}, [StopAfter(root / "never.ckpt", None, also), Dies()])
"""


@pytest.mark.parametrize(("checkpoint", "steps"), [("none", 8), ("10", 10), ("3", 8)])
def test_a_killed_process_leaves_its_last_checkpoint_or_its_last_closed_chord(
    checkpoint: str, steps: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), checkpoint], capture_output=True, text=True, timeout=200,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    before = files_of(tmp_path / "run")
    machine = exported(tmp_path / "run" / "recording", tmp_path / "out")
    assert machine.chords[-1].last_step == steps
    assert files_of(tmp_path / "run") == before
    x = digits()[1].tensors[0]
    assert machine.fidelity([x])["fidelity"] > 0.9
    assert len(machine.example_ids) == 96


# disks


class Full:
    """A disk on which every write from the n-th segment on fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, number: int = errno.ENOSPC) -> None:
        self.calls, whole = 0, writer.write_segment

        def full(directory: Path, header: Any, groups: Any) -> str:
            self.calls += 1
            if self.calls > after:
                raise OSError(number, os.strerror(number))
            return whole(directory, header, groups)

        monkeypatch.setattr(writer, "write_segment", full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_stops_the_fit_with_a_clear_message(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Full(monkeypatch, 3, number)
    with pytest.raises(StoreError, match=rf"{os.strerror(number)}.* 3 segments are safe in .*rank-0000") as raised:
        run(tmp_path, adamw, {"nodes": 6}, {})
    assert raised.value.errno == number
    assert full.calls == 4, "a file that could not be written was tried again"
    monkeypatch.undo()
    machine = exported(tmp_path / "run" / "recording", tmp_path / "out")
    assert [chord.index for chord in machine.chords] == [0, 1]


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_stops_the_recording_and_not_the_fit(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = adamw()
    pl.seed_everything(7, verbose=False)
    trainer_for(tmp_path, []).fit(plain, *loaders())
    Full(monkeypatch, after)
    module = adamw()
    pl.seed_everything(7, verbose=False)
    path_kernel = PathKernelCallback(str(tmp_path / "run"), nodes=6, probes=40, on_store_error="stop_recording")
    trainer = trainer_for(tmp_path, [path_kernel, StopAfter(tmp_path / "late.ckpt", 16, kill=False)])
    with pytest.warns(UserWarning, match="has stopped recording, training goes on: .*No space left on device"):
        trainer.fit(module, *loaders())
    assert trainer.global_step == 18
    for a, b in zip(plain.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(a, b), "a recording that stops must not change training"
    assert not any(m._forward_hooks for m in module.modules())
    assert not path_kernel.machine_dir.exists()
    monkeypatch.undo()
    if after:
        machine = exported(tmp_path / "run" / "recording", tmp_path / "out")
        assert [chord.index for chord in machine.chords] == [0, 1]
    again = trainer_for(tmp_path, [PathKernelCallback(str(tmp_path / "run"), nodes=6, probes=40)])
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="the recording had stopped before it"):
        again.fit(adamw(), *loaders(), ckpt_path=tmp_path / "late.ckpt")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="on_store_error must be one of raise, stop_recording, found 'ignore'"):
        PathKernelCallback(on_store_error="ignore")


# the thread


def test_the_training_thread_waits_while_too_much_is_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, gate = writer.write_segment, threading.Event()

    def slow(directory: Path, header: Any, groups: Any) -> str:
        gate.wait(20)
        return whole(directory, header, groups)

    monkeypatch.setattr(writer, "write_segment", slow)
    own = tmp_path / "rank-0000"
    own.mkdir()
    made = writer.SegmentWriter(own, writer.Stamp("run", 0, "c"), writer.Head(0, "root"), limit=1000)
    rows = {"rows": {"x": torch.zeros(200)}}
    made.put("chord", (0, 1), {}, rows)
    done = threading.Event()

    def more() -> None:
        made.put("chord", (1, 2), {}, rows)
        done.set()

    thread = threading.Thread(target=more)
    thread.start()
    assert not done.wait(0.3), "1,600 bytes were taken with a limit of 1,000"
    gate.set()
    assert done.wait(20)
    thread.join()
    head, _ = made.flush()
    assert head.segments == 2
    second = segments.read_segment(own / "segment-000001.safetensors")
    first = segments.read_segment(own / "segment-000000.safetensors")
    assert (first.header.previous, second.header.previous) == ("root", first.sha256)
    assert head.sha256 == second.sha256


def test_a_fit_with_workers_that_forked_ends_and_gives_the_lock_up(tmp_path: Path) -> None:
    training, validation = digits()
    path_kernel = PathKernelCallback(str(tmp_path / "run"), nodes=6, probes=40)
    loader = DataLoader(training, 32, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
    trainer = trainer_for(tmp_path, [path_kernel], max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(adamw(), loader, DataLoader(validation, 50))
    verify(path_kernel.machine_dir)
    lock = WriterLock(tmp_path / "run" / "recording" / "rank-0000")
    lock.release()


def test_a_lock_is_not_kept_by_a_forked_child(tmp_path: Path) -> None:
    """A data loader's worker may outlive its killed parent by seconds; a resume must not wait for it."""
    lock = WriterLock(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    try:
        lock.release()
        start = time.perf_counter()
        WriterLock(tmp_path).release()
        assert time.perf_counter() - start < 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
