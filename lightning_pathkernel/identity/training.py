"""`TrainingIds`: the ids of every batch that is trained on, whichever way they are found."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_pathkernel.identity.errors import REMEDY, UNKNOWN, IdentityError
from lightning_pathkernel.identity.loaders import MODES, Place, find_places, part_of, tensors_in, with_offsets
from lightning_pathkernel.identity.passes import Line
from lightning_pathkernel.identity.sampling import IndexRecorder, refusal
from lightning_pathkernel.identity.user import UserIds

__all__ = ["BatchRows", "TrainingIds"]


class BatchRows(NamedTuple):
    """The rows that one loader gave to a batch.

    Attributes:
        ids: Which example each row is, ``[n]``, int64, on the CPU.
        batch: The part of the batch that these rows are in.
    """

    ids: Tensor
    batch: Any


class TrainingIds:
    """Finds the ids of every batch that is trained on.

    Without a function of the user's, an id is ``offset + index``: the index in the dataset, as the batch sampler drew
    it, and the total length of the datasets before it, in the order of the loaders (0 for one loader). Collate
    functions may do anything to a batch but reorder its rows.

    Lightning's loops are read where no hook tells what is needed: ``fit_loop._combined_loader`` with its ``_mode`` and
    ``_iterator``, ``fit_loop._data_fetcher`` with its ``length``; and torch's iterators: ``_sampler_iter`` and
    ``_num_yielded``.

    Args:
        example_ids: The user's function, or None for dataset indices.
    """

    def __init__(self, example_ids: Callable[[Any], Any] | None = None) -> None:
        self._user = None if example_ids is None else UserIds(example_ids)
        self._recorders: dict[int, IndexRecorder] = {}
        self._shadow: Callable[[object], object] | None = None
        self._shadowed: Callable[[object], object] | None = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._places: list[Place] = []
        self._mode = ""
        self._epoch: weakref.ref[Any] | None = None
        self._lines: list[Line] = []

    # hooking in and out

    def watch(self, trainer: Any) -> None:
        """Wrap the batch sampler of every training loader as the strategy processes it; call in ``setup("fit")``.

        Args:
            trainer: The Trainer.
        """
        self.release(trainer)
        if self._user is not None:
            return
        strategy = trainer.strategy
        original = strategy.process_dataloader

        def process(loader: object) -> object:
            processed = original(loader)
            ours = self._shadow is process and trainer.state.stage == "train"
            again = id(processed) in self._recorders  # a reload may give the same loader
            if ours and not again and refusal(processed) is None:
                self._recorders[id(processed)] = IndexRecorder(processed, lambda: _epoch(trainer))
            return processed

        self._shadowed = strategy.__dict__.get("process_dataloader")
        self._shadow = strategy.process_dataloader = process

    def release(self, trainer: Any) -> None:
        """Leave the strategy and every loader as they were; may be called at any time.

        Args:
            trainer: The Trainer.
        """
        for recorder in self._recorders.values():
            recorder.restore()
        self._recorders.clear()
        if self._shadow is not None and trainer.strategy.__dict__.get("process_dataloader") is self._shadow:
            if self._shadowed is None:
                del trainer.strategy.process_dataloader
            else:
                trainer.strategy.process_dataloader = self._shadowed
        self._shadow = self._shadowed = None
        self._forget_fit()

    # the fit

    def begin(self, trainer: Any) -> None:
        """Check the training loaders and give every dataset its range of ids; call in ``on_train_start``.

        Args:
            trainer: The Trainer, its loaders set up.

        Raises:
            IdentityError: If the batches of a loader cannot be traced, or the training step fetches its own.
        """
        if type(trainer.fit_loop._data_fetcher).__name__ == "_DataLoaderIterDataFetcher":
            raise IdentityError(
                f"{UNKNOWN}: training_step takes dataloader_iter and fetches its batches itself. Take batch and "
                "batch_idx instead."
            )
        combined = trainer.fit_loop._combined_loader
        self._mode = combined._mode
        if self._mode not in MODES:
            raise IdentityError(
                f"{UNKNOWN}: the CombinedLoader's mode is {self._mode!r}. Lightning trains from {', '.join(MODES)}."
            )
        self._places = self._find(combined)

    def _find(self, combined: Any) -> list[Place]:
        places = find_places(combined.iterables, combined.flattened)
        return places if self._user is not None else with_offsets(places)

    def facts(self) -> dict[str, Any]:
        """How ids were found, JSON-able: which loader and index an id stands for is read from it.

        Returns:
            ``source``: ``dataset`` or ``example_ids``; ``mode``: how loaders are combined, None for one; ``loaders``:
            ``name``, ``offset`` and ``length`` of each, in order. Offset and length are None where ``example_ids`` is
            the source, and the length where a dataset has none.
        """
        own = self._user is None
        table = [{"name": p.name, "offset": p.offset if own else None, "length": p.length} for p in self._places]
        several = len(self._places) > 1
        return {
            "source": "dataset" if own else "example_ids",
            "mode": self._mode if several else None,
            "loaders": table,
        }

    def new_names(self, peek: bool = False) -> dict[int, str]:
        """String ids met since the last call, by the integers that stand for them; empty where ids are integers.

        Args:
            peek: Only look: the next call is told of them too.

        Returns:
            The names.
        """
        return {} if self._user is None else self._user.new_names(peek)

    def state(self) -> dict[str, Any]:
        """What a fit needs that goes on later, as plain values; the names are in the recording."""
        return {} if self._user is None else self._user.state()

    def restore(self, state: Mapping[str, Any], names: Mapping[int, str]) -> None:
        """Go on from a state.

        Args:
            state: The state.
            names: Those that `new_names` gave away before it was saved.
        """
        if self._user is not None:
            self._user.restore(state, names)

    def rows(self, trainer: Any, batch: Any) -> list[BatchRows]:
        """The examples of a batch; call in ``on_train_batch_start``.

        Args:
            trainer: The Trainer.
            batch: The batch, as the training step will get it.

        Returns:
            One entry for each loader that gave a part of the batch, in their order; one for a single loader.

        Raises:
            IdentityError: If the examples cannot be told, or are not as many as the part has rows.
        """
        combined = trainer.fit_loop._combined_loader
        if self._epoch is None or self._epoch() is not combined._iterator:
            # batches that a collate function leaves out count as batches too: only a resumed epoch begins in its midst
            resumed = self._epoch is None and bool(trainer.ckpt_path)
            self._begin_epoch(combined, trainer.fit_loop.batch_idx if resumed else 0)
        parts = [(k, place, part_of(batch, place)) for k, place in enumerate(self._places)]
        given = [(k, place, part) for k, place, part in parts if part is not None]
        if self._user is not None:
            found = self._user(batch, [place.called for _, place, _ in given], len(self._places) > 1)
        else:
            found = [self._drawn(trainer, combined, k) for k, _, _ in given]
        for ids, (_, place, part) in zip(found, given, strict=True):
            self._check_rows(ids, place, part)
        return [BatchRows(ids, part) for ids, (_, _, part) in zip(found, given, strict=True)]

    def _begin_epoch(self, combined: Any, begun: int) -> None:
        """The loaders are iterated anew, from batch ``begun`` of the epoch on: a resumed fit begins in its midst."""
        self._epoch = weakref.ref(combined._iterator)
        places = self._find(combined)
        if [place.path for place in places] != [place.path for place in self._places]:
            raise IdentityError(f"{UNKNOWN}: other training loaders than before were reloaded. Keep their structure.")
        for before, now in zip(self._places, places, strict=True):
            if now.offset != before.offset:
                raise IdentityError(
                    f"{UNKNOWN}: datasets changed their lengths when loaders were reloaded: ids of the {now.called} "
                    f"began at {before.offset}, now at {now.offset}. Keep the lengths, or pass example_ids=."
                )
        used = {id(place.loader) for place in places}
        for key in self._recorders.keys() - used:  # loaders of epochs before a reload
            self._recorders.pop(key).restore()
        self._places = places
        self._lines = [
            Line(self._recorders[id(place.loader)], begun) for place in places if id(place.loader) in self._recorders
        ]
        if self._user is None and len(self._lines) < len(places):
            raise IdentityError(f"{UNKNOWN}: a training loader was not there when loaders were set up. {REMEDY}")

    def _drawn(self, trainer: Any, combined: Any, k: int) -> Tensor:
        drawing, place = combined._iterator.iterators[k], self._places[k]
        if trainer.fit_loop._data_fetcher.length is not None:
            indices = self._lines[k].known(drawing)
        else:
            indices = self._lines[k].ahead(drawing, combined._iterator, trainer.fit_loop.batch_idx)
        if len(self._places) > 1 and len(indices) and place.length is not None and int(indices.max()) >= place.length:
            raise IdentityError(
                f"{UNKNOWN}: the sampler of the {place.called} drew index {int(indices.max())} of a dataset of length "
                f"{place.length}, an id of the dataset after it. Correct the dataset's __len__. {REMEDY}"
            )
        return indices + place.offset if place.offset else indices

    def _check_rows(self, ids: Tensor, place: Place, part: Any) -> None:
        if any(leaf.dim() and leaf.shape[0] == len(ids) for leaf in tensors_in(part)):
            return
        sizes = dict.fromkeys(int(leaf.shape[0]) for leaf in tensors_in(part) if leaf.dim())
        of = f" of the {place.called}" if place.path else ""
        has = f"{' or '.join(map(str, sizes))} rows" if sizes else "no tensor with rows"
        if self._user is None:
            raise IdentityError(
                f"the loader drew {len(ids)} examples, but the batch{of} has {has}: its collate function drops or adds "
                f"rows. {REMEDY}"
            )
        raise IdentityError(
            f"example_ids returned {len(ids)} ids, but the batch{of} has {has}. Return one id for each row of it."
        )


def _epoch(trainer: Any) -> object:
    """What is made anew whenever Lightning begins to iterate over the training loaders."""
    return getattr(trainer.fit_loop._combined_loader, "_iterator", None)
