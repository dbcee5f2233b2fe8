"""What is added to `tinker`. With the hosted service's address everything is as the SDK has it.

- `ServiceClient.create_lora_training_client(model_name=...)`, another name for `base_model`; also `..._async`.
- Any API key, not only those that begin with `tml-`; and none at all.
- `OptimStepResponse.learning_rates`, from the metric `learning_rate:mean`.
- The header `X-Tinker-GMI: 1` on every request: the server then takes targets that are shorter than the model input.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

HOSTED_DOMAINS = ("thinkingmachines.dev", "thinkingmachines.ai")
HEADER = {"X-Tinker-GMI": "1"}
DEFAULT_API_KEY = "tml-no-key"
"""Sent where no key is configured at all; a server that listens on the loopback address takes any."""
SUPPORTED = "0.38."

_any_key: ContextVar[bool] = ContextVar("tinker_gmi_any_key", default=False)
"""Whether the client under construction may have a key of any form."""


def is_hosted(base_url: Any) -> bool:
    """Whether a client with this `base_url` (None is the environment's, else the SDK's own) uses the hosted service."""
    from tinker.lib.base_url import resolve_base_url

    host = urlsplit(resolve_base_url(base_url)).hostname or ""
    return any(host == domain or host.endswith("." + domain) for domain in HOSTED_DOMAINS)


def extend(tinker: ModuleType) -> None:
    """Add the above to the imported SDK. A version that is not supported stays as it is, with a warning."""
    if not tinker.__version__.startswith(SUPPORTED):
        warnings.warn(
            f"tinker_gmi extends tinker {SUPPORTED}x and leaves {tinker.__version__} alone; "
            "pip install 'tinker>=0.38,<0.39'",
            stacklevel=2,
        )
        return
    from tinker.lib._auth_token_provider import ApiKeyAuthProvider
    from tinker.lib.internal_client_holder import InternalClientHolder

    InternalClientHolder.__init__ = _mark_requests(InternalClientHolder.__init__)
    ApiKeyAuthProvider.__init__ = _accept_any_key(ApiKeyAuthProvider.__init__)
    service = tinker.ServiceClient
    service.create_lora_training_client = _alias_model_name(service.create_lora_training_client)
    service.create_lora_training_client_async = _alias_model_name(service.create_lora_training_client_async)
    tinker.OptimStepResponse.learning_rates = property(_learning_rates)


def _mark_requests(original: Callable[..., None]) -> Callable[..., None]:
    """For `InternalClientHolder`: every client, and its copies in other processes, is made from one."""

    @functools.wraps(original)
    def __init__(self, *args, base_url=None, api_key=None, default_headers_overrides=None, **kwargs):
        hosted = is_hosted(base_url)
        if not hosted:
            default_headers_overrides = {**(default_headers_overrides or {}), **HEADER}
            if not api_key and not _has_credentials():
                api_key = DEFAULT_API_KEY
        token = _any_key.set(not hosted)
        try:
            original(
                self,
                *args,
                base_url=base_url,
                api_key=api_key,
                default_headers_overrides=default_headers_overrides,
                **kwargs,
            )
        finally:
            _any_key.reset(token)

    return __init__


def _has_credentials() -> bool:
    from tinker.lib.credentials import JsonCredentialStore, default_credentials_path

    if os.environ.get("TINKER_API_KEY") or os.environ.get("TINKER_CREDENTIAL_CMD"):
        return True
    return JsonCredentialStore(default_credentials_path()).get_default_key() is not None


def _accept_any_key(original: Callable[[Any, str], None]) -> Callable[[Any, str], None]:
    @functools.wraps(original)
    def __init__(self, api_key):
        if not _any_key.get() or api_key.startswith(("tml-", "eyJ")):
            return original(self, api_key)
        original(self, "tml-")  # passes the SDK's check of the prefix, which is all that it does with the key
        self._token = api_key

    return __init__


def _alias_model_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self, *args, **kwargs):
        if "model_name" in kwargs and "base_model" not in kwargs and not args and not is_hosted(self._base_url):
            kwargs["base_model"] = kwargs.pop("model_name")
        return original(self, *args, **kwargs)

    return create


def _learning_rates(self) -> list[float]:
    """The learning rates of the step, one for each parameter group; a LoRA adapter has one."""
    rate = (self.metrics or {}).get("learning_rate:mean")
    if rate is None:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'learning_rates'")
    return [rate]
