"""Run the application with uvicorn."""

import errno
import ipaddress
import logging
import socket

import uvicorn

from ov_serve.app import create_app
from ov_serve.guard import LOOPBACK, Limits, protocol
from ov_serve.index import Index
from ov_serve.model import Model

log = logging.getLogger("ov_serve")
_MAX_HEADER_BYTES = 16 << 10


def serve(
  model: Model,
  index: Index | None = None,
  *,
  host: str = "127.0.0.1",
  port: int = 8000,
  allow_hosts: tuple[str, ...] = (),
  limits: Limits | None = None,
) -> None:
  """Serve until SIGINT or SIGTERM.

  Args:
    model: model.
    index: index of this model, or None.
    host: address to listen on.
    port: port to listen on; 0 for any free port.
    allow_hosts: accepted names of the Host header; required for addresses other than loopback.
    limits: limits of requests.

  Raises:
    ValueError: if other machines could connect but no accepted name is given, `host` is no address
      of this machine, or `port` is out of range.
    OSError: if the port is in use or not permitted.
  """
  limits = limits or Limits()
  if not _is_loopback(host) and not allow_hosts:
    raise ValueError(
      f"host={host} accepts connections of other machines, without passwords or encryption; name "
      "this server with allow_host, or use 127.0.0.1"
    )
  if not 0 <= port <= 65_535:
    raise ValueError(f"port={port}: expected 0 to 65535")
  listener = _listen(host, port)
  names = allow_hosts if _is_loopback(host) else (*allow_hosts, host)
  config = uvicorn.Config(
    create_app(model, index, hosts=names, limits=limits),
    http=protocol(limits),
    ws="none",
    lifespan="on",
    log_config=None,
    access_log=False,
    server_header=False,
    proxy_headers=False,
    limit_concurrency=limits.connections,
    timeout_keep_alive=int(limits.header_seconds),
    timeout_graceful_shutdown=10,
    h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
  )
  name = f"[{host}]" if ":" in host else host
  log.info("listening on http://%s:%d", name, listener.getsockname()[1])
  try:
    uvicorn.Server(config).run(sockets=[listener])
  finally:
    listener.close()


def _listen(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  listener = socket.socket(family, socket.SOCK_STREAM)
  try:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(128)
  except OSError as error:
    listener.close()
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
      raise ValueError(
        f"host={host}: {error.strerror}; choose an address of this machine"
      ) from None
    text = f"{error.strerror}; choose another port"
    raise OSError(error.errno, text, f"{host}:{port}") from None
  return listener


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host in LOOPBACK
