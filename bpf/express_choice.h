/* Which endpoint a request goes to, and whether there is a token left for it. */

static inline bool spent(struct pl_xprogram *p, u32 program, u64 now)
{
  u64 *full = xbuckets.lookup(&program), interval, at;

  if (!full)
    return true;
  interval = 1000000000 / p->rate_per_s;
  at = *(volatile u64 *)full;
  if (at < now) {
    at = now;
    *(volatile u64 *)full = now; /* two CPUs may both: one request more */
  }
  if (at - now > interval * (p->burst - 1))
    return true;
  __sync_fetch_and_add(full, interval);
  return false;
}

static inline u32 bits_of(u32 mask)
{
  mask = (mask & 0x55) + (mask >> 1 & 0x55);
  mask = (mask & 0x33) + (mask >> 2 & 0x33);
  return (mask & 0xf) + (mask >> 4 & 0xf);
}

/* The nth set bit of eight, which has that many: the place before which lie all that have no more than n set up to themselves.
 * Each is counted in a byte of its own and nothing is compared: of comparisons compilers make branches, and the verifier goes
 * each way, with a choice of two 65536 ways (seen with LLVM 19 on 6.18: E2BIG; with LLVM 14 they were half its work). */
static inline u32 nth(u32 mask, u32 n)
{
  u64 bits = (EACH(mask & 0xff) & 0x8040201008040201ull) + 0x00406070787c7e7full; /* bit i decides bit 7 of byte i */
  u64 upto = EACH(bits >> 7 & EACH(1));

  return EACH((EACH(n | 0x80) - upto) >> 7 & EACH(1)) >> 56 & (PL_X_SLOTS - 1);
}
_Static_assert(PL_X_SLOTS == 8, "nth() is of a byte's bits");

static inline s32 load_of(u32 program, u32 slot)
{
  u32 i = program * PL_X_SLOTS + slot;
  u32 *load = xloads.lookup(&i);
  s32 n = load ? *(volatile s32 *)load : 0;

  return n < 0 ? 0 : n;
}

/* Which endpoint: a group by weight, then the less loaded of two. PL_X_NO_SLOT: none */
static inline u32 choose_slot(struct pl_xverdict *v, u32 program, u32 random)
{
  u32 place = (u64)(random & 0xffff) * v->total >> 16, mask = 0, n, a, b;

  #pragma unroll
  for (int i = 3; i >= 0; i--)
    if (place < v->group[i].upto)
      mask = v->group[i].mask;
  n = bits_of(mask & 0xff);
  if (!n)
    return PL_X_NO_SLOT;
  if (n == 1)
    return nth(mask, 0);
  random = bpf_get_prandom_u32();
  a = (random & 0xffff) * n >> 16;
  b = (random >> 16) * (n - 1) >> 16;
  b += b >= a;
  a = nth(mask, a);
  b = nth(mask, b);
  return load_of(program, b) < load_of(program, a) ? b : a;
}

static inline bool may_ask(struct pl_xverdict *v, u32 slot)
{
  u32 before = 0, mask = 0;

  #pragma unroll
  for (int i = 0; i < 4; i++) {
    if (v->group[i].upto > before)
      mask |= v->group[i].mask;
    before = v->group[i].upto;
  }
  return mask >> (slot & (PL_X_SLOTS - 1)) & 1;
}
