"""Old module paths: importing one imports the names of the module at its new path, with a `DeprecationWarning`.

To be removed in version 0.2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    f"chatstream.{old}": f"chatstream.{new}"
    for old, new in {
        "engines.answer": "engines.text.answer",
        "engines.checkpoint_defaults": "engines.loading.checkpoint_defaults",
        "engines.cpu_threads": "engines.loading.cpu_threads",
        "engines.detokenizer": "engines.text.detokenizer",
        "engines.engine_thread": "engines.thread.engine_thread",
        "engines.handover": "engines.thread.handover",
        "engines.logprobs": "engines.text.logprobs",
        "engines.memory": "engines.loading.memory",
        "engines.model": "engines.batching.model",
        "engines.prefix_pool": "engines.batching.prefix_cache",
        "engines.prompt_budget": "engines.batching.prompt_budget",
        "engines.prompt_fitting": "engines.text.prompt_fitting",
        "engines.sequence": "engines.batching.sequence",
        "engines.step_engine": "engines.batching.engine",
        "engines.step_loop": "engines.batching.loop",
        "engines.token_mask": "engines.batching.token_mask",
        "engines.transformers.settings": "engines.loading.settings",
        "prompts": "engines.text.chat_template",
        "runtime.places": "runtime.positions",
        "scheduler.adaptive": "scheduler.limits.adaptive",
        "scheduler.line": "scheduler.policies.sorted_keys",
        "scheduler.policies.fair_places": "scheduler.policies.fair_positions",
        "scheduler.predictor": "scheduler.policies.predictor",
        "scheduler.step_time": "scheduler.limits.step_time",
        "scheduler.turns": "scheduler.eligibility",
    }.items()
}
"""Maps old paths to new paths."""


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        target = import_module(new)
        vars(module).update({name: value for name, value in vars(target).items() if not name.startswith("__")})


def install() -> None:
    """Make the old paths importable. Idempotent."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
