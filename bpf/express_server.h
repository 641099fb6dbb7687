/* What a server sends: a response, or more of one. */

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
static inline void finish(struct pl_xrecord *r, struct pl_xstat *st, void *tp)
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
  if (r->counted)
    load_less(r);
  note_thread(&r->answerer, current_task(), current_ids(), tp);
  r->done_ns = now;
  r->phase = PL_XP_IDLE;
  BARRIER;
  *(volatile u32 *)&r->busy = 0;
}

/* The codes that servers use; each is counted apart, in a map that has room for so many of everybody and not for whatever one
 * server makes up. 502 to 504 are tried again by user space */
static inline bool usual(u32 status)
{
  return status - 200 <= 26 || status - 300 <= 8 || status - 400 <= 31 || status == 451 || status - 500 <= 1 ||
         status - 505 <= 6;
}

/* The response's head: 0, or why it is handed over. total: its bytes, head and body */
static inline u32 response_head(struct sk_msg_md *m, struct pl_xend *e, struct pl_xrecord *r, struct pl_xprogram *p, u32 *total)
{
  u32 n, length, status, stamp = *(volatile u32 *)&p->stamp; /* before whatever it stands for */
  u8 *d, *end;

  BARRIER;
  if (!stamp)
    return PL_XR_GENERATION;
  if (!contiguous(m))
    return PL_XR_RESPONSE_HEAD;
  d = m->data;
  end = m->data_end;
  n = scan(e, d, end, p->response, stamp);
  if (*(volatile u32 *)&p->stamp != stamp)
    return PL_XR_GENERATION;
  if (!n)
    return PL_XR_RESPONSE_HEAD;
  status = e->reg[PL_XA_STATUS];
  if (!usual(status))
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
  u64 clean;
  struct pl_config *c = configuration();
  struct pl_xstat *st = NULL;
  struct pl_xprogram *p;
  u64 key;

  sends_again(&r->answerer);
  clean = e->settled && all_read(tp) ? clean_at(rcv) : 0;
  if (*(volatile u64 *)&s->clean != clean) /* mostly it is, and the line stays where it is in the CPUs' caches */
    *(volatile u64 *)&s->clean = clean;
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
  if (!in_one_piece(m))
    return hand_over(r, tp, PL_XR_RESPONSE_BUDGET);
  if (!key || xsocks.msg_redirect_hash(m, &key, BPF_F_INGRESS) != SK_PASS)
    return hand_over(r, tp, PL_XR_TARGET_GONE);
  r->status = status;
  r->resp_bytes += n;
  r->resp_left = left - n;
  if (n == left)
    finish(r, st, tp);
  else
    r->phase = PL_XP_BODY;
  return SK_PASS;
}
