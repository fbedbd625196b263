"""Where channels meet the local hypervisor: tcp, unix, stdio, file, exec, xl."""
