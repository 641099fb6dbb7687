/* express(): runs for what an enrolled application's socket sends, under that socket's lock. Carries complete requests to
 * the server's socket and bounded responses back; whatever it is not sure of takes the ordinary way (SK_PASS).
 *
 * The latch is arithmetic: bytes on the ordinary way move TCP's sequence numbers, redirected ones do not. So every condition
 * below that compares one fails by itself after any SK_PASS, until the proxy has read all of it and arms again.
 *
 * A message goes one way as a whole. bpf_msg_apply_bytes would let it be split, but the kernel keeps the redirection for
 * the rest of the same message, whatever the program says about that (seen on 6.18: msg->sk_redir is never cleared). */

#define REG_BAD 7 /* an action met its bit twice */
#define REG_END 6
#define DONE 1
#define ACT 0x8000
#define STICKY_NS 1000
#define REFS_KNOWN_NS 100000000 /* after so long without an answer, references are timers' */

/* The table's run over [d, end): the head's length, 0 if it has no answer. Registers and result are in the socket's storage,
 * or the verifier would follow each of their values; the action is arithmetic, or it would follow each kind. */
static inline u32 scan(struct pl_xend *e, u8 *d, u8 *end, u32 root)
{
  u32 block = root / PL_X_STATES;
  u64 state = root % PL_X_STATES; /* 64 bits wide like the registers: narrower ones cost two shifts a step */
  u16 *rows = xrows.lookup(&block);
  struct pl_xact *acts = xacts.lookup(&block);

  if (!rows || !acts)
    return 0;
  e->reg[REG_END] = 0;
  e->reg[PL_XA_RULE] = 0;
  e->reg[PL_XA_ONCE] = 0;
  e->reg[PL_XA_DIGIT] = 0;
  e->reg[PL_XA_MATCH] = 0;
  e->reg[PL_XA_STATUS] = 0;
  e->reg[REG_BAD] = 0;
  KEEP_LOOP
  for (u64 i = 0; i < PL_X_HEAD_BYTES; i++) {
    u64 byte, from = state;

    if (d + i + 1 > end)
      break;
    byte = d[i];
    state = rows[state * 256 + byte];
    if (state & ACT) {
      u32 kind = acts[from].kind & 7, value = acts[from].value, old = e->reg[kind];
      u32 digit = kind & (kind >> 1 | kind >> 2) & 1;            /* DIGIT, STATUS */
      u32 keep = digit * 10 + 1 - (kind & 1);                    /* those: 10; RULE: 0; ONCE, MATCH: 1 */
      u32 once = kind >> 1 & ~kind & ~(kind >> 2) & 1;

      e->reg[REG_BAD] |= old & value & (0 - once);
      e->reg[kind] = (old * keep & ~value) + value + digit * ((u32)byte - '0');
    }
    state &= PL_X_STATES - 1;
    if (state <= DONE) {
      *(volatile u32 *)&e->reg[REG_END] = (u32)(state * (i + 1));
      break;
    }
  }
  return e->reg[REG_BAD] ? 0 : *(volatile u32 *)&e->reg[REG_END];
}

/* The start of a message in one piece: a writev may have left it in several. false: not to be had */
static inline bool contiguous(struct sk_msg_md *m)
{
  u32 want = m->size < PL_X_HEAD_BYTES ? m->size : PL_X_HEAD_BYTES;
  u8 *d = m->data, *end = m->data_end;

  if (d + want <= end)
    return true;
  return bpf_msg_pull_data(m, 0, want, 0) == 0;
}

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

/* The nth set bit of eight */
static inline u32 nth(u32 mask, u32 n)
{
  u32 found = 0;

  #pragma unroll
  for (u32 i = 0; i < PL_X_SLOTS; i++) {
    u32 bit = mask >> i & 1;
    found += i * (bit & (n == 0));
    n -= bit; /* wraps below zero once found: never 0 again within eight */
  }
  return found;
}

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

static inline int to_user(struct pl_xrecord *r, u32 reason)
{
  r->punt = reason;
  xcount(reason);
  return SK_PASS;
}

/* More of a body whose head went fast. It follows its head whatever has changed since: the server waits for it */
static inline int more_of_request(struct sk_msg_md *m, struct pl_xrecord *r, u32 slot)
{
  u32 left = r->req_left, n = m->size;
  u64 key;

  if (!left || r->handed) {
    r->hold = 1;
    return to_user(r, r->handed ? PL_XR_HANDED : PL_XR_PIPELINED);
  }
  key = r->slots[slot & (PL_X_SLOTS - 1)].key;
  if (n > left) { /* with the next request behind it: all of it is user space's, which goes on with the body */
    r->handed_at = r->slots[slot & (PL_X_SLOTS - 1)].srv_seq;
    BARRIER;
    r->handed = 1;
    return to_user(r, PL_XR_PIPELINED);
  }
  if (!key || xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS) {
    r->hold = 1;
    return to_user(r, PL_XR_TARGET_GONE);
  }
  r->req_left = left - n;
  r->req_bytes += n;
  if (left == n)
    r->phase = PL_XP_HEAD;
  return SK_PASS;
}

/* Nothing stands against carrying a request of this socket now: 0, or why it does */
static inline u32 not_now(struct pl_config *c, struct pl_xrecord *r, struct pl_xend *e, struct pl_xprogram *p, void *tp, u64 now)
{
  if (r->off)
    return PL_XR_OFF;
  if (!*(volatile u32 *)&r->armed)
    return PL_XR_NOT_ARMED;
  BARRIER;
  if (r->hold)
    return PL_XR_HOLD;
  if (!e->settled)
    return PL_XR_UNSETTLED;
  if (!p->generation || *(volatile u32 *)&p->generation != generation_of(c))
    return PL_XR_GENERATION;
  if (c->lease_until_ns && now > c->lease_until_ns)
    return PL_XR_LEASE;
  if (TCP_U32(tp, O_WRITE_SEQ) != r->arm_up)
    return PL_XR_BEHIND;
  if (TCP_U32(tp, O_RCV_NXT) != r->arm_down || !all_read(tp))
    return PL_XR_UNREAD;
  return 0;
}

static inline int from_client(struct sk_msg_md *m, struct pl_xend *e, struct pl_xrecord *r, void *tp)
{
  struct pl_config *c = configuration();
  u32 program = r->program, busy = *(volatile u32 *)&r->busy, reason, n, length, slot, random, refs, load;
  struct pl_xprogram *p;
  struct pl_xverdict_key k = {};
  struct pl_xverdict *v;
  struct pl_xslot *s;
  u8 *d, *end;
  u64 now, key;
  u32 *loads;

  if (busy)
    return more_of_request(m, r, busy - 1);
  p = xprograms.lookup(&program);
  if (!c || !p)
    return to_user(r, PL_XR_NO_RECORD);
  now = boot_ns();
  reason = not_now(c, r, e, p, tp, now);
  if (reason)
    return to_user(r, reason);

  if (!contiguous(m))
    return to_user(r, PL_XR_HEAD);
  d = m->data;
  end = m->data_end;
  n = scan(e, d, end, p->root);
  if (!n)
    return to_user(r, PL_XR_HEAD);
  length = e->reg[PL_XA_DIGIT];
  if (length > PL_X_BODY_BYTES)
    return to_user(r, PL_XR_BODY);
  if (m->size > n + length)
    return to_user(r, PL_XR_PIPELINED);

  k.program = program;
  k.rule = e->reg[PL_XA_RULE] & ~ACT;
  k.seen = e->reg[PL_XA_MATCH];
  v = xverdicts.lookup(&k);
  if (!v)
    return to_user(r, PL_XR_VERDICT);
  random = bpf_get_prandom_u32();
  if (random >> 16 < p->sample)
    return to_user(r, PL_XR_SAMPLE);
  slot = choose_slot(v, program, random);

  /* A client that does not wait for its responses must not see the next one overtake the last, which may be on its way
   * still from another server: its sender holds a reference while it is. Then the same server is asked again. */
  refs = TCP_U32(tp, O_REFS);
  if (!r->refs || refs < r->refs || now - r->done_ns > REFS_KNOWN_NS)
    r->refs = refs;
  if (r->last && r->last != slot + 1 && (refs > r->refs || now - r->done_ns < STICKY_NS)) {
    slot = r->last - 1;
    if (!may_ask(v, slot))
      return to_user(r, PL_XR_PIPELINED);
  }
  if (slot >= PL_X_SLOTS)
    return to_user(r, PL_XR_NO_SLOT);
  slot &= PL_X_SLOTS - 1;
  s = &r->slots[slot];
  key = s->key;
  if (!key || s->workload != p->endpoints[slot])
    return to_user(r, PL_XR_NO_SLOT);
  if (s->dirty)
    return to_user(r, PL_XR_DIRTY);
  if (*(volatile u64 *)&s->clean != clean_at(s->up_seq))
    return to_user(r, PL_XR_UNCLEAN);
  /* The last word before the bytes move: the tables may have been exchanged meanwhile, the record armed anew */
  if (*(volatile u32 *)&p->generation != generation_of(c))
    return to_user(r, PL_XR_GENERATION);
  if (p->rate_per_s && spent(p, program, now))
    return to_user(r, PL_XR_RATE);
  if (xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS) {
    s->dirty = 1;
    return to_user(r, PL_XR_TARGET_GONE);
  }

  n &= 2 * PL_X_HEAD_BYTES - 1;
  if (n > PL_X_HEAD_BYTES)
    n = PL_X_HEAD_BYTES;
  d = m->data;
  end = m->data_end;
  read_kernel(r->head, n, d);
  r->head_len = n;
  r->name = v->name;
  r->rule = k.rule;
  r->method_head = e->reg[PL_XA_RULE] >> 15 & 1;
  r->status = 0;
  r->req_bytes = m->size;
  r->req_left = n + length - m->size;
  r->resp_left = 0;
  r->resp_bytes = 0;
  r->handed = 0;
  r->t0_ns = now;
  r->last = slot + 1;
  r->phase = r->req_left ? PL_XP_REQUEST : PL_XP_HEAD;
  if (p->nendpoints > 1) { /* else there is no choice to make by it */
    load = program * PL_X_SLOTS + slot;
    loads = xloads.lookup(&load);
    if (loads)
      __sync_fetch_and_add(loads, 1);
    r->counted = 1;
  }
  BARRIER;
  *(volatile u32 *)&r->busy = slot + 1; /* from here on the server's answer counts; its bytes move when we return */
  xcount(PL_XR_CARRIED);
  return SK_PASS;
}

/* ---- what a server sends */

static inline int hand_over(struct pl_xrecord *r, void *tp, u32 reason)
{
  r->handed_at = TCP_U32(tp, O_WRITE_SEQ);
  BARRIER;
  r->handed = 1;
  return to_user(r, reason);
}

/* NULL: the map is full */
static inline struct pl_xstat *stat_of(struct pl_xrecord *r, u32 status)
{
  struct pl_xstat_key k = {};
  struct pl_xstat *st, *blank;
  u32 zero = 0;

  k.program = r->program;
  k.name = r->name;
  k.status = status;
  st = xstats.lookup(&k);
  if (st)
    return st;
  blank = xblank.lookup(&zero);
  if (!blank)
    return NULL;
  xstats.insert(&k, blank);
  return xstats.lookup(&k);
}

/* Counted before the last byte is delivered: whoever has read the response finds it counted */
static inline void finish(struct pl_xrecord *r, struct pl_xstat *st, u32 slot)
{
  u64 now = boot_ns(), ns = now - r->t0_ns;
  u32 i = bucket_of(ns);

  if (st) {
    __sync_fetch_and_add(&st->requests, 1);
    __sync_fetch_and_add(&st->bytes_in, r->req_bytes);
    __sync_fetch_and_add(&st->bytes_out, r->resp_bytes);
    __sync_fetch_and_add(&st->ns, ns);
    if (i < PL_X_BUCKETS)
      __sync_fetch_and_add(&st->buckets[i], 1);
  } else {
    xcount(PL_XR_STAT_FULL);
  }
  xcount(PL_XR_ANSWERED);
  load_less(r, slot);
  r->done_ns = now;
  r->phase = PL_XP_IDLE;
  BARRIER;
  *(volatile u32 *)&r->busy = 0;
}

/* The response's head: 0, or why it is handed over. total: its bytes, head and body */
static inline u32 response_head(struct sk_msg_md *m, struct pl_xend *e, struct pl_xrecord *r, struct pl_xprogram *p, u32 *total)
{
  u32 n, length, status;
  u8 *d, *end;

  if (!contiguous(m))
    return PL_XR_RESPONSE_HEAD;
  d = m->data;
  end = m->data_end;
  n = scan(e, d, end, p->response);
  if (!n)
    return PL_XR_RESPONSE_HEAD;
  status = e->reg[PL_XA_STATUS];
  if (status < 200 || status > 599 || (status >= 502 && status <= 504))
    return PL_XR_RESPONSE_STATUS;
  length = e->reg[PL_XA_DIGIT];
  if (status == 204 || status == 304 || r->method_head)
    length = 0;
  else if (!(e->reg[PL_XA_ONCE] & PL_XO_LENGTH))
    return PL_XR_RESPONSE_HEAD;
  if (length > PL_X_BUDGET_BYTES || n + length > PL_X_BUDGET_BYTES)
    return PL_XR_RESPONSE_BUDGET;
  *total = n + length;
  return 0;
}

static inline int from_server(struct sk_msg_md *m, struct pl_xend *e, struct pl_xrecord *r, void *tp, u32 slot)
{
  struct pl_xslot *s = &r->slots[slot & (PL_X_SLOTS - 1)];
  u32 program = r->program, rcv = TCP_U32(tp, O_RCV_NXT), n = m->size, left, reason, status;
  struct pl_config *c = configuration();
  struct pl_xstat *st = NULL;
  struct pl_xprogram *p;
  u64 key;

  *(volatile u64 *)&s->clean = e->settled && all_read(tp) ? clean_at(rcv) : 0;
  if (*(volatile u32 *)&r->busy != slot + 1) {
    if (r->armed && !s->dirty && rcv == s->up_seq && TCP_U32(tp, O_WRITE_SEQ) == s->srv_seq)
      xcount(PL_XR_UNASKED);
    s->dirty = 1;
    return SK_PASS;
  }
  BARRIER;
  if (r->handed)
    return SK_PASS;
  p = xprograms.lookup(&program);
  if (!c || !p || r->off)
    return hand_over(r, tp, PL_XR_OFF);
  if (r->hold)
    return hand_over(r, tp, PL_XR_HOLD);
  if (*(volatile u32 *)&p->generation != generation_of(c))
    return hand_over(r, tp, PL_XR_GENERATION);
  if (r->req_left)
    return hand_over(r, tp, PL_XR_EARLY);
  if (TCP_U32(tp, O_WRITE_SEQ) != s->srv_seq)
    return hand_over(r, tp, PL_XR_BEHIND);

  left = r->resp_left;
  status = r->status;
  if (r->phase != PL_XP_BODY) {
    reason = response_head(m, e, r, p, &left);
    if (reason)
      return hand_over(r, tp, reason);
    status = e->reg[PL_XA_STATUS];
    st = stat_of(r, status);
    if (!st)
      return hand_over(r, tp, PL_XR_STAT_FULL);
  } else if (n == left) {
    st = stat_of(r, status);
  }
  if (n > left) /* bytes nobody asked for behind it */
    return hand_over(r, tp, PL_XR_SURPLUS);
  key = r->client_key;
  if (!key || xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS)
    return hand_over(r, tp, PL_XR_TARGET_GONE);
  r->status = status;
  r->resp_bytes += n;
  r->resp_left = left - n;
  if (n == left)
    finish(r, st, slot);
  else
    r->phase = PL_XP_BODY;
  return SK_PASS;
}

int express(struct sk_msg_md *m)
{
  struct bpf_sock *sk = m->sk; /* read once: each read is a new maybe-null to the verifier */
  struct pl_xrecord *r;
  struct pl_xend *e;
  void *tp;
  u32 slot;

  if (!sk)
    return SK_PASS;
  e = xends.sk_storage_get(sk, 0, 0);
  if (!e)
    return SK_PASS;
  tp = to_tcp_sock(sk);
  if (!tp)
    return SK_PASS;
  if (!e->settled && TCP_U32(tp, O_RCV_NXT) != e->seq && TCP_U32(tp, O_COPIED_SEQ) == TCP_U32(tp, O_RCV_NXT))
    e->passed = 1;
  r = record_of(e);
  if (!r) {
    xcount(PL_XR_NO_RECORD);
    return SK_PASS;
  }
  /* Its own key says whether the record still means this socket, in this place */
  if (e->side == PL_X_CLIENT) {
    if (r->client_key == e->key)
      return from_client(m, e, r, tp);
  } else if (e->side == PL_X_SERVER) {
    slot = *(volatile u32 *)&e->slot & (PL_X_SLOTS - 1);
    if (r->slots[slot].key == e->key)
      return from_server(m, e, r, tp, slot);
  }
  xcount(PL_XR_NO_RECORD);
  return SK_PASS;
}

/* Attached to xprobes: everything goes to the socket whose key the agent left as `record` */
int express_probe(struct sk_msg_md *m)
{
  struct bpf_sock *sk = m->sk;
  struct pl_xend *e;
  u64 key;

  if (!sk)
    return SK_PASS;
  e = xends.sk_storage_get(sk, 0, 0);
  if (!e)
    return SK_PASS;
  key = e->record;
  xprobes.msg_redirect_hash(m, &key, BPF_F_INGRESS);
  return SK_PASS;
}

/* Attached to xreads and xprobereads: TCP's own bytes go where redirected ones do, so that order and FIONREAD are right */
int express_read(struct __sk_buff *skb)
{
  return SK_PASS;
}
