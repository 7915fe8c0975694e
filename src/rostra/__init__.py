"""Rostra: a service registry and service mesh for bare metal and VMs.

The code lives in the top-level directories of the repository; this package is the name they are imported under.
"""

__version__ = "0.1.0"
#: The Consul API level that clients are told (`Config.Version` of /v1/agent/self): many of them compare it.
CONSUL_API_VERSION = "1.8.7"
