"""A server and its clients in one process; //tests/multiprocess has real ones."""

import socket

import pytest

from ov_sharding.key_values import Board, Server, board


@pytest.fixture
def server():
  server = Server()
  yield server
  server.close()


def client(server: Server, token: str = "") -> Board:
  return Board(("127.0.0.1", server.port), token or server.token)


def test_all_see_the_last_text_of_a_key(server):
  one, other, zero = client(server), client(server), Board(("", 0), "", server)
  assert one.get("word") is None
  one.put("word", "first\nline")
  other.put("word", "é")
  assert [b.get("word") for b in (one, other, zero)] == ["é"] * 3
  zero.put("hosts/0", "a")
  one.put("hosts/12", "b")
  assert one.items("hosts") == zero.items("hosts") == {"0": "a", "12": "b"}
  assert one.items("host") == {}


def test_a_wrong_token_gets_no_answer(server):
  client(server).put("key", "secret")
  with pytest.raises(ConnectionError, match="process 0 does not answer"):
    client(server, "wrong").get("key")


def test_garbage_ends_the_connection_only(server):
  with socket.create_connection(("127.0.0.1", server.port)) as connection:
    connection.sendall(b"GET / HTTP/1.1\r\n")
    assert connection.recv(100) == b""
  assert client(server).get("key") is None


def test_without_process_0_every_call_raises_and_a_later_one_reconnects():
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


def test_one_process_has_no_board():
  assert board() is None
