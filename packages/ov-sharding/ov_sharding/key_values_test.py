"""Tests with server and clients in one process; //tests/multiprocess uses several processes."""

import logging
import socket
import threading

import pytest

from ov_sharding import key_values
from ov_sharding.key_values import Board, Server, board


@pytest.fixture
def server():
  server = Server()
  yield server
  server.close()


def client(server: Server, token: str = "") -> Board:
  return Board(("127.0.0.1", server.port), token or server.token)


def test_all_clients_read_the_last_value(server):
  one, other, zero = client(server), client(server), Board(("", 0), "", server)
  assert one.get("word") is None
  one.put("word", "first\nline")
  other.put("word", "é")
  assert [b.get("word") for b in (one, other, zero)] == ["é"] * 3
  zero.put("hosts/0", "a")
  one.put("hosts/12", "b")
  assert one.items("hosts") == zero.items("hosts") == {"0": "a", "12": "b"}
  assert one.items("host") == {}


def test_wrong_token_is_rejected(server):
  client(server).put("key", "secret")
  with pytest.raises(ConnectionError, match="process 0 does not answer"):
    client(server, "wrong").get("key")


def test_malformed_request_closes_only_its_connection(server):
  with socket.create_connection(("127.0.0.1", server.port)) as connection:
    connection.sendall(b"GET / HTTP/1.1\r\n")
    assert connection.recv(100) == b""
  assert client(server).get("key") is None


def test_calls_raise_without_process_0_and_reconnect_later():
  with socket.create_server(("127.0.0.1", 0)) as unused:
    port = unused.getsockname()[1]
  lost = Board(("127.0.0.1", port), "token")
  assert not lost.reachable()
  with pytest.raises(ConnectionError, match="process 0 does not answer"):
    lost.get("key")
  server = Server()
  lost.address, lost._token = ("127.0.0.1", server.port), server.token
  assert lost.reachable() and lost.get("key") is None
  server.close()


def test_failed_accept_is_logged_and_retried(monkeypatch, caplog):
  accept, reasons = socket.socket.accept, ["Too many open files", "Connection aborted"]
  failures = list(reasons)

  def fail_first(self):
    if failures:
      raise OSError(failures.pop(0))
    return accept(self)

  monkeypatch.setattr(socket.socket, "accept", fail_first)
  monkeypatch.setattr(key_values, "_RETRY_SECONDS", 0.01)
  with caplog.at_level(logging.WARNING):
    server = Server()
    assert client(server).get("key") is None
  assert [record.getMessage() for record in caplog.records] == [
    f"cannot accept a connection on port {server.port}: {reason}; retrying in 0.01 s"
    for reason in reasons
  ]
  server.close()


def test_close_ends_the_thread_without_a_warning(caplog):
  before = set(threading.enumerate())
  server = Server()
  (thread,) = set(threading.enumerate()) - before
  with caplog.at_level(logging.WARNING):
    server.close()
    thread.join(10)
  assert not thread.is_alive() and not caplog.records
  assert not client(server).reachable()


def test_one_process_has_no_board():
  assert board() is None
