"""Authentication and authorisation: API keys, the admin key, session cookies and addresses.

Reads headers and addresses of requests; contains nothing of queues or models.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from itsdangerous import BadData, URLSafeSerializer
from starlette.requests import HTTPConnection
from starlette.responses import Response

from chatstream.errors import ConfigError, Forbidden, InvalidRequest, Unauthorized

SESSION_COOKIE = "chatstream_session"
CONVERSATION_HEADER = "X-ChatStream-Conversation"
MAX_CONVERSATION_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessSettings:
    """Keys are compared in constant time and never logged. A wrong value raises `ConfigError` that names it."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Bearer tokens that may generate; empty: no key is needed."""
    admin_key: str | None = field(default=None, repr=False)
    """Bearer token that may inspect and change the queue. None: callers from this machine that address it as localhost
    may."""
    session_secret: str | None = field(default=None, repr=False)
    """Key that signs the session cookies. None: a new one at each start, which makes old cookies invalid."""

    def __post_init__(self) -> None:
        # A str is a sequence of strings too: each letter would become a key.
        keys: object = self.api_keys
        if not isinstance(keys, tuple) or not all(isinstance(key, str) and key.strip() for key in keys):
            raise ConfigError("api_keys must be a tuple of non-empty strings", param="api_keys")
        for name in ("admin_key", "session_secret"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                raise ConfigError(f"{name} must be a non-empty string", param=name)


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity of the caller of one HTTP request."""

    client: str
    """The unit of fairness: API key, else user, else session, else address."""
    key_id: str
    """A short hash of the API key; empty without keys."""


class Access:
    """Checks the callers of one server."""

    def __init__(self, settings: AccessSettings | None = None) -> None:
        self._settings = settings or AccessSettings()
        secret = self._settings.session_secret or secrets.token_hex(32)
        self._signer = URLSafeSerializer(secret, salt="chatstream-session")

    def identify(self, connection: HTTPConnection, *, user: str | None = None) -> Caller:
        """Identify the caller. Raises `Unauthorized` when the server has API keys and the request has none of them."""
        key_id = self._key_id(connection)
        if key_id:
            return Caller(f"key:{key_id}", key_id)
        if user:
            return Caller(f"user:{user}", "")
        session_id = self._read_session(connection)
        if session_id is not None:
            return Caller(f"session:{session_id[:8]}", "")
        return Caller(f"address:{connection.client.host if connection.client else 'unknown'}", "")

    def require_admin(self, connection: HTTPConnection) -> str:
        """Check for admin rights and return the caller's name for the log. Raises `Unauthorized` or `Forbidden`."""
        admin_key = self._settings.admin_key
        if admin_key is None:
            if not _is_from_this_machine(connection):
                raise Forbidden(
                    f"only callers from this machine may do this, at {_localhost(connection)}; "
                    "set an admin key to allow others"
                )
            return "admin on this machine"
        token = _bearer_token(connection)
        if token is None:
            raise Unauthorized("this needs the admin key as bearer token")
        if not _equal(token, admin_key):
            raise Forbidden("this is not the admin key")
        return "admin"

    def is_admin(self, connection: HTTPConnection) -> bool:
        """Whether the caller presented the admin key. A local address gives no right to other clients' requests."""
        token, admin_key = _bearer_token(connection), self._settings.admin_key
        return token is not None and admin_key is not None and _equal(token, admin_key)

    def session_id(self, connection: HTTPConnection) -> str:
        """The session id in the signed cookie; a new id when there is no cookie or its signature is wrong."""
        return self._read_session(connection) or secrets.token_urlsafe(16)

    def conversation_key(self, connection: HTTPConnection, session_id: str) -> str:
        """The key of a conversation: the session id and the value of a header, for example one for each browser tab.

        Raises `InvalidRequest` when the header is too long.
        """
        name = connection.headers.get(CONVERSATION_HEADER, "")
        if len(name) > MAX_CONVERSATION_CHARS:
            raise InvalidRequest(
                f"{CONVERSATION_HEADER} must have at most {MAX_CONVERSATION_CHARS} characters",
                param=CONVERSATION_HEADER,
            )
        return f"{session_id}/{name}"

    def set_session(self, response: Response, connection: HTTPConnection, session_id: str) -> None:
        """Set the session cookie, unless the request sent it."""
        if self._read_session(connection) == session_id:
            return
        response.set_cookie(
            SESSION_COOKIE,
            str(self._signer.dumps(session_id)),
            path=connection.scope.get("root_path") or "/",
            secure=connection.url.scheme == "https",
            httponly=True,
            samesite="lax",
        )

    def _read_session(self, connection: HTTPConnection) -> str | None:
        cookie = connection.cookies.get(SESSION_COOKIE)
        if cookie is None:
            return None
        try:
            session_id = self._signer.loads(cookie)
        except BadData:
            return None
        return session_id if isinstance(session_id, str) else None

    def _key_id(self, connection: HTTPConnection) -> str:
        keys = self._settings.api_keys
        if not keys:
            return ""
        token = _bearer_token(connection)
        if token is None:
            raise Unauthorized("this server needs an API key as bearer token")
        admin_key = self._settings.admin_key
        allowed = (*keys, admin_key) if admin_key is not None else keys
        # All keys are compared, so that the time taken reveals nothing about a partial match.
        if sum(_equal(token, key) for key in allowed) == 0:
            raise Unauthorized("this API key is unknown")
        return hashlib.sha256(token.encode()).hexdigest()[:8]


def _bearer_token(connection: HTTPConnection) -> str | None:
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _equal(left: str, right: str) -> bool:
    return secrets.compare_digest(left.encode(), right.encode())


def _is_from_this_machine(connection: HTTPConnection) -> bool:
    """Whether the caller runs on this machine. A forwarded request does not, wherever the proxy runs."""
    headers = connection.headers
    if "forwarded" in headers or "x-forwarded-for" in headers or connection.client is None:
        return False
    # A browser on this machine may show a hostile page. If the page's host name resolves to this machine (DNS
    # rebinding), its calls are same-origin, and only their Host header reveals them.
    if not all(_is_name_of_this_machine(host) for host in headers.getlist("host")):
        return False
    origin = headers.get("origin")
    if origin is not None and origin != f"{connection.url.scheme}://{headers.get('host', '')}":
        return False
    return _is_loopback(connection.client.host)


def _is_name_of_this_machine(host: str) -> bool:
    """Whether the value of a `Host` header names this machine, by a name that no public DNS server can assign."""
    try:
        parts = urlsplit(f"//{host}")
        name = parts.hostname or ""
    except ValueError:
        return False
    if parts.netloc != host or "@" in host:
        return False
    is_local_name = bool(name) and not set(name) & set(".:")  # localhost, or the machine's own name in its network
    return is_local_name or name.endswith(".localhost") or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _localhost(connection: HTTPConnection) -> str:
    """The loopback address and port of this server."""
    _, port = connection.scope.get("server") or ("", None)
    return "127.0.0.1" if port is None else f"127.0.0.1:{port}"
