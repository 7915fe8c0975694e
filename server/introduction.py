"""How a server makes itself known to one whose list of servers is so old that it does not name it.

A server that was away while the others changed may find nobody of its own list. The certificate of a node says who it
is, not that it is a server. But only servers, and those that were, hold the key of the cluster CA: it is in the log. So
a server shows its list with a proof made by that key, for the key that TLS knows it by; it is of no use to anyone else.
The other one hears it (`RaftLog.introduce`) while there is no leader. Its vote counts for nothing: the log decides who
a member is. Pure; `roster.py` and `standing.py` send and take it.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from rostra.server.membership import Membership, dump_membership, parse_membership

_PURPOSE = "rostra: this key is a server's, 1"


def introduce(membership: Membership, key_hash: str, ca_key_pem: str) -> dict[str, Any]:
    """What the server with that key adds to its question ("bootstrap.join"): {membership, proof}."""
    return {"membership": dump_membership(membership), "proof": _proof(membership.cluster_id, key_hash, ca_key_pem)}


def introduced(
    said: Mapping[str, Any], key_hash: str, *, me: str, cluster_id: str, ca_key_pem: str
) -> Membership | None:
    """The list of the server that TLS knows by `key_hash`; None where it proves nothing, or does not name `me` (a key
    hash) and itself. Raises BadRequest for a list that is none."""
    proof = said.get("proof")
    if not isinstance(proof, str) or not hmac.compare_digest(
        proof.encode(), _proof(cluster_id, key_hash, ca_key_pem).encode()
    ):
        return None
    membership = parse_membership(said.get("membership"))
    is_ours = membership.cluster_id == cluster_id and membership.has_key(me) and membership.has_key(key_hash)
    return membership if is_ours else None


def _proof(cluster_id: str, key_hash: str, ca_key_pem: str) -> str:
    return hmac.new(ca_key_pem.encode(), f"{_PURPOSE}\0{cluster_id}\0{key_hash}".encode(), "sha256").hexdigest()
