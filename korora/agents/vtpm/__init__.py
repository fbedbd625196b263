"""The vTPM agent: keeps a virtual machine and its virtual TPM together, so that there is always exactly one.

ctrl.py and commands.py know the bytes (sans-IO), swtpm.py the emulator, epochs.py who has a vTPM, handover.py what
follows from what, carrier.py does it. docs/vtpm.md has the picture. The relay imports none of this; ``proxy.vtpm`` is
what it asks for.
"""
