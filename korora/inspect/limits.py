"""Limits of `korora inspect`, with their units and reasons: a file to look at may be anything."""

from typing import Final

MIB: Final = 1024 * 1024

PIECE_BYTES: Final = 4 * MIB  # read at a time, as the relay makes its frames
ZSTD_WINDOW_BYTES_MAX: Final = 128 * MIB  # of a compressed file, as `zstd -d --long=27`
CHUNK_BITS: Final = 16  # pages remembered are kept in chunks of 65536, made when first needed
CHUNKS_MAX: Final = 512  # 12 bytes a page: 400 MiB at most, for a guest of 128 GiB; pages beyond are not followed
ROUNDS_MAX: Final = 10_000  # that are told apart; what comes behind belongs to the last
ROUNDS_PIECE_MAX: Final = 64  # rounds that may begin within a piece; a real one is longer than many pieces
TIME_BINS_MAX: Final = 512  # of the timeline; twice the pieces a bin when there are more
REGIONS_MAX: Final = 2048  # of guest memory in the heat map; twice as large when there are more
ROUNDS_SHOWN: Final = 12  # in the table for people; --json has them all
RECORDS_SHOWN: Final = 24  # types of records in the table
TEXT_CHARACTERS_MAX: Final = 200  # of what a stream says of itself
