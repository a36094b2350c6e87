"""Which training examples are in a batch: indices noted where samplers draw them, or a function of the user's."""

from lightning_pathkernel.identity.errors import IdentityError
from lightning_pathkernel.identity.training import BatchRows, TrainingIds
from lightning_pathkernel.identity.user import string_id

__all__ = ["BatchRows", "IdentityError", "TrainingIds", "string_id"]
