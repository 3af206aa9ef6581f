"""Models that a function of the user builds: ``package.module:factory``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from torch import nn

from serve_app.errors import StoreError
from serve_app.models.builders.base import Metadata
from serve_app.models.builders.refusals import foreign_reason, require_module
from serve_app.models.sources.pretrained import PRETRAINED
from serve_app.models.torchvision_compat import declare_missing_operators, let_operators_be_called


class FactoryBuilder:
    """``package.module:factory``: a callable without arguments that returns an ``nn.Module``.

    Its ``pretrained`` weights are whatever the factory puts into the module. Nothing of it is imported before it is
    called: a publisher asks where the weights are, and must not run foreign code.
    """

    unused: tuple[str, ...] = ()

    def __init__(self, builder: str) -> None:
        self._builder = builder

    def pretrained_source(self) -> None:
        """Return None: a factory fetches its weights itself."""
        return

    def construct(self, weights: str) -> nn.Module:
        """Call the factory.

        Raises:
            StoreError: there is no such module or attribute, or it returns something else.
        """
        module = self._imported()()
        let_operators_be_called()
        return require_module(module, f"builder {self._builder!r}")

    def pretrained(self, file: Path | None) -> nn.Module:
        """Call the factory."""
        return self.construct(PRETRAINED)

    def metadata(self) -> Metadata:
        """Return defaults: nothing is known."""
        return Metadata()

    def _imported(self) -> Callable[[], object]:
        # The factory may import torchvision, as transformers and others do.
        declare_missing_operators()
        module, _, attribute = self._builder.partition(":")
        try:
            factory: Callable[[], object] = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise StoreError(
                f"builder {self._builder!r} cannot be imported ({error}); name it package.module:factory, and put "
                "the folder of the package on PYTHONPATH, also where edgeserve up starts"
            ) from error
        except (Exception, SystemExit) as error:
            # The user's module raises what it likes.
            raise StoreError(
                f"builder {self._builder!r} cannot be imported ({foreign_reason(error)}); correct {module}"
            ) from error
        return factory
