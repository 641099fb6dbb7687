/* What a client sends: a request, or more of one. */

#define STICKY_NS 1000
#define SAMPLED_AT_ONCE 16
#define SAMPLED_AT_ONCE_BUSY 64
#define BUSY_NS 20000 /* from one request to the next on a CPU */
#define REFS_KNOWN_NS 100000000 /* after so long without an answer, references are timers' */

/* More of a body whose head went fast. It follows its head whatever has changed since: the server waits for it */
static inline int more_of_request(struct sk_msg_md *m, struct pl_xrecord *r, void *tp, u32 slot)
{
  u32 left = r->req_left, n = m->size;
  u64 key;

  if (!left || r->handed) {
    r->hold = 1;
    return to_user(r, r->handed ? PL_XR_HANDED : PL_XR_PIPELINED);
  }
  if (TCP_U32(tp, O_WRITE_SEQ) != r->arm_up) { /* some of it went the ordinary way, or its end did: so does the rest */
    r->hold = 1;
    return to_user(r, PL_XR_BEHIND);
  }
  key = r->slots[slot & (PL_X_SLOTS - 1)].key;
  if (n > left) { /* with the next request behind it: all of it is user space's, which goes on with the body */
    r->handed_at = r->slots[slot & (PL_X_SLOTS - 1)].srv_seq;
    BARRIER;
    r->handed = 1;
    return to_user(r, PL_XR_PIPELINED);
  }
  if (!key || !in_one_piece(m) || xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS) {
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

/* User space sees some requests, `sample` of 65536 on average, several in a row: to wake it, and to fill the CPU's caches with
 * it, costs more than a request does. More in a row where they follow close upon each other: it is over as soon. */
static inline bool sampled(struct pl_xsampled *s, u32 sample, u32 random, u64 now)
{
  u32 at_once;

  if (!sample)
    return false;
  at_once = now - s->last_ns < BUSY_NS ? SAMPLED_AT_ONCE_BUSY : SAMPLED_AT_ONCE;
  s->last_ns = now;
  if (s->more) {
    s->more--;
    return true;
  }
  if (random >= (sample / at_once ?: 1) && sample < 65536)
    return false;
  s->more = at_once - 1;
  return true;
}

/* Good enough to split requests by (xorshift); the kernel's own takes ten times as long */
static inline u32 random_of(struct pl_xsampled *s)
{
  u64 x = s->dice ?: bpf_get_prandom_u32() | 1;

  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  s->dice = x;
  return x >> 32;
}

static inline int from_client(struct sk_msg_md *m, struct pl_xend *e, struct pl_xrecord *r, void *tp)
{
  struct pl_config *c = configuration();
  u32 program = r->program, busy = *(volatile u32 *)&r->busy, stamp, reason, n, length, slot, random, refs, load, zero = 0;
  struct pl_xprogram *p;
  struct pl_xverdict_key k = {};
  struct pl_xsampled *last;
  struct pl_xhead *h;
  struct pl_xverdict *v;
  struct pl_xslot *s;
  u8 *d, *end;
  u64 now, key, task;
  u32 tid;
  u32 *loads;

  task = current_task();
  tid = current_ids();
  if ((r->sender.task != task || r->sender.tid != tid) && inside(&r->sender, 1) && !ran_since(&r->sender)) {
    if (busy)
      r->hold = 1;
    return to_user(r, PL_XR_INSIDE);
  }
  note_thread(&r->sender, task, tid, tp);
  sends_again(&r->sender);
  busy = *(volatile u32 *)&r->busy;
  if (busy)
    return more_of_request(m, r, tp, busy - 1);
  if (r->split)
    r->split = 0;
  p = xprograms.lookup(&program);
  if (!c || !p)
    return to_user(r, PL_XR_NO_RECORD);
  stamp = *(volatile u32 *)&p->stamp; /* before whatever it stands for */
  BARRIER;
  now = boot_ns();
  reason = not_now(c, r, e, p, tp, now);
  if (reason)
    return to_user(r, reason);
  if (!stamp)
    return to_user(r, PL_XR_GENERATION);

  if (!contiguous(m))
    return to_user(r, PL_XR_HEAD);
  d = m->data;
  end = m->data_end;
  n = scan(e, d, end, p->root, stamp);
  if (!n)
    return to_user(r, e->reg[REG_END] != UNENDED ? PL_XR_HEAD : m->size < PL_X_HEAD_BYTES ? PL_XR_HEAD_PART : PL_XR_HEAD_LONG);
  length = e->reg[PL_XA_DIGIT];
  if (length > PL_X_BODY_BYTES)
    return to_user(r, PL_XR_BODY);
  if (m->size > n + length)
    return to_user(r, PL_XR_PIPELINED);

  k.program = program;
  k.rule = e->reg[PL_XA_RULE] & ~ACT;
  k.seen = e->reg[PL_XA_MATCH];
  if (e->judged != stamp) {
    v = xverdicts.lookup(&k);
    if (!v)
      return to_user(r, PL_XR_VERDICT);
    e->verdict = *v;
    e->judged = stamp;
  }
  v = &e->verdict;
  last = xsampled.lookup(&zero);
  if (!last)
    return to_user(r, PL_XR_SAMPLE);
  random = random_of(last);
  if (sampled(last, p->sample, random >> 16, now))
    return to_user(r, PL_XR_SAMPLE);
  slot = choose_slot(v, program, random);

  /* A client that does not wait for its responses must not see the next one overtake the last, which may be on its way
   * still from another server: its sender holds a reference while it is. Then the same server is asked again. */
  refs = TCP_U32(tp, O_REFS);
  if (!r->refs || refs < r->refs || (refs > r->refs && now - r->done_ns > REFS_KNOWN_NS))
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
  if (*(volatile u32 *)&p->stamp != stamp)
    return to_user(r, PL_XR_GENERATION);
  if (*(volatile u32 *)&p->generation != generation_of(c))
    return to_user(r, PL_XR_GENERATION);
  if (p->rate_per_s && spent(p, program, now))
    return to_user(r, PL_XR_RATE);
  if (!in_one_piece(m))
    return to_user(r, PL_XR_HEAD);
  if (xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS) {
    s->dirty = 1;
    return to_user(r, PL_XR_TARGET_GONE);
  }

  n &= 2 * PL_X_HEAD_BYTES - 1;
  if (n > PL_X_HEAD_BYTES)
    n = PL_X_HEAD_BYTES;
  d = m->data;
  end = m->data_end;
  key = r->id;
  if (e->saved != key) { /* else it is this very head */
    h = xheads.lookup(&key);
    if (h)
      read_kernel(h->bytes, n, d);
    r->head_len = n;
    e->saved = key;
  }
  r->name = v->name;
  r->rule = k.rule;
  r->method_head = e->reg[PL_XA_RULE] >> 15 & 1;
  r->status = 0;
  r->req_bytes = m->size;
  r->req_left = n + length - m->size;
  if (r->req_left)
    r->split = 1;
  r->resp_left = 0;
  r->resp_bytes = 0;
  r->handed = 0;
  r->t0_ns = now;
  if (r->last != slot + 1)
    r->last = slot + 1;
  r->phase = r->req_left ? PL_XP_REQUEST : PL_XP_HEAD;
  if (p->chooses) {
    load = program * PL_X_SLOTS + slot;
    loads = xloads.lookup(&load);
    if (loads)
      __sync_fetch_and_add(loads, 1);
    *(volatile u64 *)&r->counted = load + 1;
  }
  BARRIER;
  *(volatile u32 *)&r->busy = slot + 1; /* from here on the server's answer counts; its bytes move when we return */
  xcount(PL_XR_CARRIED);
  return SK_PASS;
}
