"""The hand-over: which of two hosts runs the virtual machine, decided once. Sans-IO; docs/handover.md has the picture.

table.py is the whole of it, machine.py steps through it, record.py is what is kept of it, xl.py what xl says meanwhile.
"""
