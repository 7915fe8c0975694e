"""Rules between settings: names, addresses and ports are settled, and what cannot be together is told.

`settle` is called once all flags and files are read. Definitions are checked as the running agent checks them
(`agent/file_definitions.py`, imported only where a file has some).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence

from rostra.agent.config.found import Found
from rostra.agent.values import ANY_ADDRESS, is_address

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def settle(found: Found) -> None:
    _settle_names(found)
    _settle_servers(found)
    _settle_addresses(found)
    _settle_rest(found)
    if found.services or found.checks:
        _settle_definitions(found)


def _settle_names(found: Found) -> None:
    v = found.values
    from rostra.wire.bounds import DATACENTER_CHARS_MAX, NODE_NAME_RULE, is_node_name

    v["node_name"] = str(v["node_name"]).strip() or socket.gethostname()
    if not is_node_name(v["node_name"]):
        found.complain("node_name", f'"{v["node_name"]}" is no name for a node: {NODE_NAME_RULE}')
    elif not re.fullmatch(r"[A-Za-z0-9-]+", v["node_name"]):
        found.warnings.append(
            f'node name "{v["node_name"]}" will not be found by DNS: it has other characters than a-z, 0-9 and -'
        )
    v["node_id"] = str(v["node_id"]).lower()
    if v["node_id"] and not _UUID.fullmatch(v["node_id"]):
        found.complain("node_id", f'"{v["node_id"]}" is not a UUID')
    v["datacenter"] = str(v["datacenter"]).lower()
    if not re.fullmatch(rf"[a-z0-9_-]{{1,{DATACENTER_CHARS_MAX}}}", v["datacenter"]):
        found.complain(
            "datacenter",
            f'datacenter cannot be "{v["datacenter"]}": use only a-z, 0-9, - and _, {DATACENTER_CHARS_MAX} at most',
        )
    for name in ("domain", "alt_domain"):
        v[name] = str(v[name]).strip().strip(".").lower()
        if re.search(r"[\s/]|\.\.", v[name]) or (name == "domain" and not v[name]):
            found.complain(name, f'"{v[name]}" is not a DNS domain')
    if v["node_meta"]:
        from rostra.agent.definition import meta_problem

        problem = meta_problem(v["node_meta"])
        if problem:
            found.complain("node_meta", problem)


def _settle_servers(found: Found) -> None:
    v = found.values
    n = v["bootstrap_expect"]
    if v["dev"] and n > 1:
        found.complain("bootstrap_expect", "'bootstrap_expect > 0' not allowed in dev mode")
    elif n > 0:
        if n > 1 and v["bootstrap"]:
            found.complain("bootstrap_expect", "'bootstrap_expect > 0' and 'bootstrap = true' are mutually exclusive")
        if not v["server"]:
            found.complain("bootstrap_expect", "'bootstrap_expect > 0' requires 'server = true'")
        if n == 1:
            v["bootstrap"] = True
            if v["dev"]:
                found.warnings.append("bootstrap_expect = 1: the same as bootstrap = true, which -dev implies")
        elif n % 2 == 0:
            survived = f"{n // 2 - 1}, as one of {n - 1}" if n > 2 else "none"
            found.warnings.append(f"bootstrap_expect = {n}: a cluster of {n} servers survives the loss of {survived}")
    elif v["bootstrap_expect"] < 0:
        found.complain("bootstrap_expect", f"cannot be {n}")
    elif v["bootstrap"] and not v["server"]:
        found.complain("bootstrap", "'bootstrap = true' requires 'server = true'")
    if v["non_voting_server"]:
        if not v["server"]:
            found.complain("non_voting_server", "'non_voting_server = true' requires 'server = true'")
        elif v["dev"] or v["bootstrap"]:
            found.complain("non_voting_server", "a server that never votes cannot form a cluster by itself")
        elif v["bootstrap_expect"] > 0:
            found.warnings.append("bootstrap_expect does not count here: a server that never votes founds no cluster")
    if v["dev"] and v["data_dir"]:
        found.warnings.append("data_dir is not used with -dev: the state is in memory and ends with the agent")
    elif not v["dev"] and not v["data_dir"] and not found.is_incomplete and not found.named("data_dir"):
        found.problem("", "", "data_dir cannot be empty: give -data-dir=PATH, or -dev to try things out")
    if v["data_dir"]:
        v["data_dir"] = os.path.abspath(v["data_dir"])
        if os.path.exists(v["data_dir"]) and not os.path.isdir(v["data_dir"]):
            found.complain("data_dir", f"{v['data_dir']} is not a directory")


def _settle_addresses(found: Found) -> None:
    v = found.values
    v["bind_addr"] = v["bind_addr"] or "0.0.0.0"
    if v["advertise_addr"] in ANY_ADDRESS:
        found.complain("advertise_addr", "advertise address cannot be 0.0.0.0, :: or [::]")
    elif not v["advertise_addr"] and v["bind_addr"] not in ANY_ADDRESS:
        v["advertise_addr"] = v["bind_addr"]
    elif not v["advertise_addr"] and not found.problems:
        try:
            v["advertise_addr"] = pick_address(host_addresses(), ipv6=v["bind_addr"] == "::")
        except ValueError as e:
            found.complain("bind_addr", str(e))
    v["client_addrs"] = v["client_addrs"] or ("127.0.0.1",)
    v["http_addrs"] = v["http_addrs"] or v["client_addrs"]
    v["dns_addrs"] = v["dns_addrs"] or tuple(a for a in v["client_addrs"] if not a.startswith("unix://"))
    if any(a.startswith("unix://") for a in v["dns_addrs"]):
        found.complain("dns_addrs", "DNS is not served on unix sockets")
    if v["sidecar_min_port"] > v["sidecar_max_port"]:
        found.complain("sidecar_min_port", f"{v['sidecar_min_port']} is above ports.sidecar_max_port")
    for field_name, is_wanted in (("join_port", True), ("server_port", v["server"])):
        if is_wanted and v[field_name] < 1 and not (v["dev"] and field_name == "server_port" and not v[field_name]):
            found.complain(field_name, f"invalid port {v[field_name]}: other nodes have to know it; 1 to 65535")
    _refuse_shared_ports(found)
    exposed = [a for a in dict.fromkeys((v["bind_addr"], *v["http_addrs"])) if not _is_local(a)]
    if v["dev"] and exposed:
        found.warnings.append(
            f"-dev is open to everyone who can reach {', '.join(exposed)}: no access control, state in memory"
        )


def _refuse_shared_ports(found: Found) -> None:
    v = found.values
    taken: list[tuple[str, str, int]] = []
    listeners = [("DNS", "dns_port", v["dns_addrs"]), ("HTTP", "http_port", v["http_addrs"])]
    listeners += [("join", "join_port", (v["bind_addr"],))]
    listeners += [("server RPC", "server_port", (v["bind_addr"],))] if v["server"] else []
    for label, field_name, addresses in listeners:
        port = v[field_name]
        for address in addresses:
            for other, other_address, other_port in taken:
                same = address == other_address or {address, other_address} & set(ANY_ADDRESS)
                if port > 0 and port == other_port and same and other != label:
                    found.complain(field_name, f"{label} address {address}:{port} already configured for {other}")
            taken.append((label, address, port))


def _settle_rest(found: Found) -> None:
    v = found.values
    for name in ("http_max_conns_per_client", "kv_max_value_bytes", "retry_max"):
        if v[name] < 0:
            found.complain(name, f"cannot be {v[name]}")
    if v["check_output_bytes_max"] < 1:
        found.complain("check_output_bytes_max", f"cannot be {v['check_output_bytes_max']}; it must be at least 1")
    if v["retry_interval_s"] == 0:
        found.complain("retry_interval_s", "cannot be 0")
    if v["allow_write_http_from"]:
        import ipaddress

        for network in v["allow_write_http_from"]:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                found.complain("allow_write_http_from", f'"{network}" is not a network such as 10.0.0.0/8')
    for name in ("dns_udp_answer_limit", "dns_a_record_limit"):
        if v[name] < 0:
            found.complain(name, f"cannot be {v[name]}; 0 or more")
    for name in ("dns_soa_refresh_s", "dns_soa_retry_s", "dns_soa_expire_s", "dns_soa_min_ttl_s"):
        if not 0 <= v[name] < 2**32:
            found.complain(name, f"cannot be {v[name]}; 0 to 4294967295 seconds")
    for recursor in v["recursors"]:
        host, colon, port = recursor.rpartition(":")
        plain = recursor.strip("[]")
        if plain in ANY_ADDRESS or host.strip("[]") in ANY_ADDRESS:
            found.complain("recursors", f'"{recursor}" is no address of a server: it cannot be 0.0.0.0, :: or [::]')
            continue
        if not is_address(plain) and not (colon and port.isdigit() and is_address(host.strip("[]"))):
            found.complain("recursors", f'"{recursor}" is not an address or address:port')
    if v["acl_enabled"]:
        found.warnings.append("acl.enabled: tokens are not enforced by this version; every request is allowed")


def _settle_definitions(found: Found) -> None:
    from rostra.agent.definition import Scripts
    from rostra.agent.file_definitions import problems

    v = found.values
    scripts = Scripts(v["enable_script_checks"], v["enable_script_checks"] or v["enable_local_script_checks"])
    data_dir = "" if v["dev"] else v["data_dir"]
    wrong = problems(found.services, found.checks, node=v["node_name"], scripts=scripts, data_dir=data_dir)
    for where, what, message in wrong:
        found.problem(where, what, message)


def _is_local(address: str) -> bool:
    return address.startswith(("127.", "unix://")) or address == "::1"


def pick_address(addresses: Sequence[str], *, ipv6: bool) -> str:
    """The one private address of a host that binds to all; ValueError says what to do where it is not one."""
    family = [a for a in addresses if (":" in a) == ipv6 and not _is_local(a)]
    private = family if ipv6 else [a for a in family if _is_private(a)]
    if len(private) == 1:
        return private[0]
    if len(family) == 1 and not private:
        return family[0]
    if not family:
        raise ValueError("no address to advertise was found on this host: give one with -advertise or -bind")
    raise ValueError(
        f"which of {', '.join(private or family)} shall other nodes use? Give one with -advertise or -bind"
    )


def _is_private(address: str) -> bool:
    a, b = (int(part) for part in address.split(".")[:2])
    return a == 10 or (a == 172 and 16 <= b <= 31) or (a == 192 and b == 168) or (a == 100 and 64 <= b <= 127)


def host_addresses() -> list[str]:
    """The addresses of this host's interfaces, without link-local ones."""
    import array
    import fcntl
    import struct

    entry = 40  # bytes of a struct ifreq on 64-bit Linux; the IPv4 address is at 20
    table = array.array("B", bytes(entry * 256))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("iL", len(table), table.buffer_info()[0])
        used = struct.unpack("iL", fcntl.ioctl(probe, 0x8912, request))[0]  # SIOCGIFCONF
    found = [socket.inet_ntoa(table[at + 20 : at + 24].tobytes()) for at in range(0, used, entry)]
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as lines:
            for line in lines:
                digits, _index, _prefix, scope, *_rest = line.split()
                if scope == "00":
                    found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    except OSError:
        pass
    return list(dict.fromkeys(a for a in found if not a.startswith("169.254.")))
