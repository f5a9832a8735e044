"""The ports of a head that is started as cluster-local.yaml does it, on a host of its own made from namespaces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.ray]

CLUSTER_FILE = Path(__file__).parents[2] / "cluster-local.yaml"
ADDRESS = "10.177.9.1"
UNSHARE = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
# An address that is not loopback, without a network: no device is needed for it.
SETUP = f"ip link set lo up && ip addr add {ADDRESS}/24 dev lo && ip route add default dev lo src {ADDRESS}"
ASK = """
import json, time, urllib.error, urllib.request
import grpc, ray, psutil

METHODS = (
    "NodeInfoGcsService/CheckAlive", "NodeManagerService/GetAgentPIDs", "ObjectManagerService/Pull",
    "ReporterService/HealthCheck", "RayletDriver/ClusterInfo", "CoreWorkerService/GetCoreWorkerStats",
)

def answer(host, port):
    try:
        return urllib.request.urlopen(f"http://{host}:{port}/api/jobs/", timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        pass
    except Exception:  # no HTTP
        pass
    said = "closed"
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=10)
                return f"answers {method}"
            except grpc.RpcError as error:
                said = error.code().name
                if said != "UNIMPLEMENTED":
                    break
    return said

time.sleep(15)  # the agents start last
found = set()
for process in psutil.process_iter():
    for each in process.net_connections("inet"):
        if each.status == psutil.CONN_LISTEN:
            found.add((each.laddr.ip.removeprefix("::ffff:"), each.laddr.port, process.name()))
everywhere = ("::", "0.0.0.0")
said = [[ip, port, name, answer("ADDRESS" if ip in everywhere else ip, port)] for ip, port, name in found]
print(json.dumps(said))
""".replace("ADDRESS", ADDRESS)


def test_only_the_agents_metrics_answer_a_stranger_on_the_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    if subprocess.run([*UNSHARE, "sh", "-c", SETUP], capture_output=True).returncode != 0:
        pytest.skip("a network namespace with an address of its own is not permitted here (it takes root and ip)")
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir(mode=0o700)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    commands = yaml.safe_load(CLUSTER_FILE.read_text())["head_start_ray_commands"]
    (start,) = (command for command in commands if "ray start --head" in command)
    start = start.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    script = f"{SETUP}\nmount -t tmpfs tmpfs /dev/shm\n{start} > {home}/start.log 2>&1 || cat {home}/start.log >&2\n"
    environment = {
        "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_TMPDIR": str(home / "r"),
        "LANG": "C.UTF-8",
    }  # fmt: skip
    (home / "ask.py").write_text(ASK)
    command = [*UNSHARE, "bash", "-c", f"{script}python {home}/ask.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(*sorted(map(str, found)), sep="\n")
    named = {name for _, _, name, _ in found}
    assert {"gcs_server", "raylet"} <= named and [port for ip, port, *_ in found if ip == "127.0.0.1" and port == 8265]
    refused = (401, 403, "UNAUTHENTICATED")
    answering = [(ip, name) for ip, _, name, said in found if ip != "127.0.0.1" and said not in refused]
    assert [ip for ip, _ in answering] == ["0.0.0.0"] and "Dashboard" in answering[0][1], answering
    assert not {44217, 44227} & {port for _, port, *_ in found}
    (dashboard,) = (said for ip, port, _, said in found if (ip, port) == ("127.0.0.1", 8265))
    assert dashboard == 401
