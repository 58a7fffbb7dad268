"""The words that all kernels use, on a GPU and on a CPU, and the constants that they share. Imports nothing.

wkv.py and linear_scan.py hold the mathematics, the adjoints included, for both devices.

WKV

    w, u            decay rate of a channel, and bonus of a token in its own output
    num, den, p     state: Σ_i e^{k_i - age_i w} v_i = num e^p, and the same sum without v_i is den e^p; callers of the
                    operators know p as max
    anchor, age     p of a state in registers: p = anchor - age w, where the anchor is the key that p comes from
    gap             p - k_t, the exponent of the past less that of a token
    weigh           find the weights of two exponents that differ by d: the heavier has 1, the lighter e = e^{-|d|}
    past, now       these weights, of the past and of the token
    absorb          let a state take in a token, or the summary of a chunk
    fold_age        make one number of anchor - age w; what its rounding cuts off is folded into num and den
    entry state     a given state, with an exponent that leaves room for the first tokens; its lift is what the exponent
                    was lowered by
    m, l            mean num / den of the past, and logarithm p + log den of its weight
    s, r            weights of a token in its own output and in the next state, both between 0 and 1
    kept            1 - r, the weight that the past keeps in the next state
    slope           r (1 - r) δ with δ = v - m, the derivative of the mean by a key
    gm, gl          adjoint: gradients of m and l that come from later tokens
    seen            whether the past of a token has any weight

Linear scan

    a               gate: the number that a state is multiplied by, e^{log a} where its logarithm is given
    parts           real and imaginary part of a complex number; a real number has one part
    h + low         a number that is carried as a sum of two, low being what the roundings of h have cut off
    exp_sum         make e^x such a sum; times_sum multiplies a sum, plus_sum adds to it, rounded_sum rounds it to one
                    number
    q               adjoint: gradient of h that comes from later tokens
    before          h_{t-1} of a token

Both

    chunk           tokens that one program goes through, one after the other; chunk_id is its number
    summary         what a chunk makes of an empty state; carry is the state that enters a chunk
    row             a token of a tile; ROWS of them are worked on together, and WKV keeps a checkpoint before each tile
    first, stop     the first of the rows of a tile that are worked on, and the one after the last of them
    edge            a token's packed sequence, and whether it starts or ends there (packing.py)
    field           distance in memory from num to den, from den to p
    constants       what a kernel is compiled for
"""

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
E64 = 6.235149080811617e27  # e^64

# e^x = 2^n (1 + p(r) r), where n is x / ln 2 rounded and r = x - n ln 2. ln 2 is a sum of two numbers, of which the
# first has so few digits that n times it is exact. p is the polynomial with the least relative error for
# |r| <= ln(2) / 2: 2.6e-9 and 6.8e-17.
LN2_HIGH_FLOAT32, LN2_LOW_FLOAT32 = 0.693145751953125, 1.4286068203094173e-06
LN2_HIGH_FLOAT64, LN2_LOW_FLOAT64 = 0.6931471805592082, 7.371002565167799e-13
EXP_FLOAT32 = (
    1.000000049796864,
    0.5000000435746266,
    0.16666364808738957,
    0.041664773315148215,
    0.008379059035691179,
    0.0014061422676135337,
)
EXP_FLOAT64 = (
    1.0000000000000007,
    0.5000000000000006,
    0.16666666666657265,
    0.04166666666657327,
    0.008333333337728652,
    0.0013888888932471243,
    0.0001984126147461493,
    2.480150434536771e-05,
    2.756426190540047e-06,
    2.762636556852593e-07,
    2.2981328866020198e-08,
)
# Below the first x, e^x is returned as 0, for 2^n would be subnormal. Above the second, 2^n overflows before e^x does.
EXP_LEAST_FLOAT32, EXP_MOST_FLOAT32 = -87.0, 80.0
EXP_LEAST_FLOAT64, EXP_MOST_FLOAT64 = -708.0, 700.0

NO_PAST = -3.4028234663852886e38  # -FLT_MAX, the exponent of an empty state in registers; no finite key is below it
MAX_RATE = 1e29  # a larger |w| is taken for this: its decay is total, or unbounded, all the same, and age * w is finite

# A state whose den is small gets 2^64 (float64: 2^512) times as much of num and den, and an exponent to match.
RAISED_BITS_FLOAT32, RAISED_BITS_FLOAT64 = 64, 512
SMALL_FLOAT32, SMALL_FLOAT64 = 2.0**-RAISED_BITS_FLOAT32, 2.0**-RAISED_BITS_FLOAT64
NEAR = 30.0  # an empty state whose exponent is this much above that of a token costs the token nothing

# Of one step of WKV, whose state is kept at a scale near e^0.
REACH = 64.0  # states are moved, and tokens heavier than the past added to it, up to e^64 = 6e27
FINE = 2.0**-7  # a smaller |p| stays as it is: half a unit in its last place, 8192 times, is 2e-6
MODERATE = 1e6  # a larger |v| would overflow where tokens are added with weights up to e^64
LARGEST, SMALLEST = 1e30, 1e-30  # bounds of what is moved, far enough from overflow for the next tokens
