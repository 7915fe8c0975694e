"""DNS: what every host answers on port 8600.

    name.py      a query's name → Lookup (service, node, address, apex, ...)        pure
    answer.py    Lookup + what the source knows → Plan (rcode and records)          pure
    alias.py     a host name for an address → what stands behind it                 pure
    message.py   the wire: packets → Query, Plan → bytes, truncation                pure
    source.py    the port to the catalog, and the values that cross it
    resolver.py  the caches in between: packet in, packet out, no sockets
    recurse.py   names of other people, asked of recursors
    serve.py     UDP and TCP sockets

The agent implements the port (`agent/dns_source.py`) and starts `serve.DnsServer`. Nothing here knows agent or server.
"""
