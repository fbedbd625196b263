"""What a host's platform is, shown to its peer by its TPM, and judged there. No TPM is met here, only what one signed.

    structures    keys, quotes and signatures of a TPM 2.0, read strictly
    binding       what ties a quote to one session, one side and one key
    quote         a quote's verification
    eventlog      the firmware's log, and the PCRs that it leads to
    ima           the kernel's list of measured files, and its PCR
    evidence      all that a host shows, as one message
    reference     what a host is allowed to be, as a file says, and the judgement
    endorsement   how an attestation key is bound to its TPM, once, at enrolment

Everything is verified with public keys alone, and nothing that a peer says is believed before.
"""
