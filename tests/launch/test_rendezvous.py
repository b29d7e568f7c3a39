"""Where the store of a job listens, for each way in which ranks may be started."""

import os
import socket
from datetime import timedelta

import pytest

from megalite.errors import UserError
from megalite.rendezvous import open_store
from tests.support.processes import listening

pytestmark = pytest.mark.fast


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def meet(size=2, **environment):
    """(where this process listens on the store's port, what the environment has become) for rank 0."""
    environment = {"MASTER_PORT": str(free_port()), **environment}
    store = open_store(0, size, timedelta(seconds=20), environment)
    store.set("key", "value")
    assert store.get("key") == b"value"
    port = environment["MASTER_PORT"]
    hosts = [address.rpartition(":")[0] for address, _ in listening({os.getpid()}) if address.endswith(f":{port}")]
    return hosts, environment


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_a_loopback_address_is_kept_to(host):
    hosts, environment = meet(MASTER_ADDR=host)
    assert hosts == ["127.0.0.1" if host == "localhost" else host]
    assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"


def test_a_name_may_stand_for_other_addresses_elsewhere():
    hosts, environment = meet(MASTER_ADDR=socket.gethostname(), LOCAL_WORLD_SIZE="1")
    assert hosts == ["::"] and "GLOO_SOCKET_IFNAME" not in environment


def test_what_launchers_and_users_say_counts():
    _, environment = meet(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME="eth7")
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("eth7", "lo")
    _, environment = meet(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE="1")
    assert "GLOO_SOCKET_IFNAME" not in environment


def test_a_launchers_socket_is_taken():
    listener = socket.create_server(("127.0.0.3", 0))
    port = str(listener.getsockname()[1])
    hosts, environment = meet(MASTER_ADDR="127.0.0.3", MASTER_PORT=port, MEGALITE_STORE_SOCKET=str(listener.detach()))
    assert hosts == ["127.0.0.3"] and "MEGALITE_STORE_SOCKET" not in environment


def test_one_process_needs_no_port():
    store = open_store(0, 1, timedelta(seconds=5), {})
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("port", ["", "x", "-1", "0", "65536", "1" * 5000])
def test_ports_are_checked(port):
    with pytest.raises(UserError, match="MASTER_PORT"):
        open_store(0, 2, timedelta(seconds=5), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
