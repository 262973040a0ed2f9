"""The kernels for CUDA, in Triton. They know tables of addresses and numbers; :mod:`normclip._backends.cuda` knows tensors.

A *chunk* is a run of elements of one tensor, a row of the table, and one program's work. All chunks of all tensors of all element types
are read in one launch: each program takes the branch of its element type. Nothing is merged by atomics; partials have their places, and
one more launch adds them in a fixed tree. The same memory gives the same bits on every run.

float16, bfloat16 and float32 are widened; products and sums are taken in float64, where squares of these types are exact and cannot
overflow. Chunks of float64 whose sum of squares leaves the safe range are read again at another scale (after Blue, 1978), as on the CPU.
Error bound: a chunk has at most 2^20 elements in at least 256 lanes, and more partials than 128 have 4096 lanes, so up to 2^35 elements a
sum passes through fewer than 2^13 roundings of 2^-53: 1e-12 relative.

    measure · pairs       chunks → a partial each
    merge                 partials → norms and moments
    change                chunks, in place
    elements              what they share: the table, the types, where elements are
"""
