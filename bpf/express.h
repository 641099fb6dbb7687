/* Express, as the ordinary hooks see it: an application's socket that stops being what it was paired as, and what the
 * proxy asks of a pair. The programs that carry requests are loaded apart (express.c): a node without them has all this. */

static long (*read_kernel)(void *dst, u32 size, const void *src) = (void *)113;

#define TASK_IN_NO_SEND 0x81 /* TASK_INTERRUPTIBLE, TASK_DEAD: what is on its way to a socket waits for that uninterruptibly */

/* The kernel lets go of a sender's socket before it queues what it redirects at the receiver's. Whether the thread that sent
 * last may be in between: nothing else, on whatever way, may be sent behind it then, or it could come first. `others`: who is
 * inside send() or recv() besides; each of them refers to the socket's psock, as do xsocks and xreads. */
static inline bool inside(struct pl_xthread *t, u32 others)
{
  u32 refs = 0, tid = 0, state = 0;

  if (!t->task || read_kernel(&refs, 4, (void *)t->refs_at) || refs <= others + 2)
    return false;
  if (read_kernel(&tid, 4, (void *)t->tid_at) || tid != t->tid) /* the task has ended */
    return false;
  return !read_kernel(&state, 4, (void *)t->state_at) && !(state & TASK_IN_NO_SEND);
}

/* It has run outside the kernel since it was seen inside: it is not in that send() any more. Each that begins later says so
 * first (sends_again()). Without this, a thread that computes would be waited for as long as it does, beside one that reads. */
static inline bool ran_since(struct pl_xthread *t)
{
  u64 ran = 0, seen = *(volatile u64 *)&t->seen;

  if (seen < PL_X_SEEN || *(volatile u64 *)&t->seen_task != t->task)
    return false;
  return !read_kernel(&ran, 8, (void *)t->ran_at) && ran + PL_X_SEEN != seen;
}

/* For who asks again and again, as the proxy alone does */
static inline bool still_inside(struct pl_xthread *t)
{
  u64 ran = 0, task = *(volatile u64 *)&t->task;

  if (!inside(t, 0) || ran_since(t))
    return false;
  if (*(volatile u64 *)&t->seen >= PL_X_SEEN && t->seen_task == task)
    return true;
  __sync_lock_test_and_set(&t->seen, 1); /* a full barrier: who is inside by now is so when its time is read */
  *(volatile u64 *)&t->seen_task = task;
  if (!read_kernel(&ran, 8, (void *)t->ran_at))
    *(volatile u64 *)&t->seen = ran + PL_X_SEEN;
  return true;
}

static inline struct pl_xrecord *record_of(struct pl_xend *e)
{
  u64 id = *(volatile u64 *)&e->record;
  u32 place = *(volatile u32 *)&e->place;
  struct pl_xrecord *r = xrecords.lookup(&place);

  return r && id && *(volatile u64 *)&r->id == id ? r : NULL;
}

/* What was asked is over. Several may say so at the same time: who answers, who takes it over, who ends the pair */
static inline void load_less(struct pl_xrecord *r)
{
  u64 at = __sync_lock_test_and_set(&r->counted, 0);
  u32 i = at - 1, *load;

  if (!at)
    return;
  load = xloads.lookup(&i);
  if (load)
    __sync_fetch_and_add(load, -1);
}

static inline struct pl_xleg *leg_of(struct pl_xend *e)
{
  u64 id = *(volatile u64 *)&e->record;

  return id && e->side >= PL_X_LEG_APP ? xlegs.lookup(&id) : NULL;
}

/* It connects again, or wants what redirected bytes can not give it: its pair or leg is over, for good */
static inline void leave_express(struct bpf_sock *sk)
{
  struct pl_xend *e = xends.sk_storage_get(sk, 0, 0);
  struct pl_xrecord *r;
  struct pl_xleg *l;

  if (!e)
    return;
  l = leg_of(e);
  if (l) {
    l->off = 1;
    return;
  }
  r = record_of(e);
  if (r)
    r->off = 1;
}

static inline struct pl_xrecord *paired(struct bpf_sock *sk)
{
  struct pl_xend *e = xends.sk_storage_get(sk, 0, 0);

  return e && e->side == PL_X_ACCEPTED ? record_of(e) : NULL;
}

static inline bool arm(struct pl_xrecord *r, const struct pl_xarm *a)
{
  struct pl_xslot *s;

  if (a->op == PL_X_HOLD) {
    r->hold = 1;
    return true;
  }
  if (a->op == PL_X_TAKE) {
    r->armed = 0;
    BARRIER;
    r->phase = PL_XP_IDLE;
    r->handed = 0;
    BARRIER;
    r->busy = 0;
    load_less(r);
    return true;
  }
  if (a->op != PL_X_ARM || r->busy)
    return false;
  /* No equality may hold by half: the client's program looks at `armed` first */
  r->armed = 0;
  BARRIER;
  if (a->slot < PL_X_SLOTS) {
    s = &r->slots[a->slot & (PL_X_SLOTS - 1)];
    s->dirty = 0;
    s->up_seq = s->base_out + a->up_sent;
    s->srv_seq = s->base_in + a->up_consumed;
  } else if (a->slot != PL_X_NO_SLOT) {
    return false;
  }
  r->arm_up = r->base_in + a->consumed;
  r->arm_down = r->base_out + a->sent;
  r->hold = 0;
  r->refs = 0; /* a whole slow exchange later no response is on its way; what holds the client's socket now is a timer */
  BARRIER;
  r->armed = 1;
  return true;
}

static inline void view(struct pl_xrecord *r, struct pl_xview *to)
{
  u32 slot = r->busy - 1;
  u64 id = r->id;
  struct pl_xhead *h = xheads.lookup(&id);

  to->record = id;
  to->flags = (r->off ? PL_XF_OFF : 0) | (r->hold ? PL_XF_HOLD : 0);
  if (still_inside(&r->sender))
    to->flags |= r->split ? PL_XF_INSIDE | PL_XF_TORN : PL_XF_INSIDE;
  if (still_inside(&r->answerer))
    to->flags |= PL_XF_ANSWERING;
  to->armed = r->armed;
  to->busy = r->busy;
  to->phase = r->phase;
  to->handed = r->handed;
  to->handed_slow = 0;
  if (r->handed && slot < PL_X_SLOTS)
    to->handed_slow = r->handed_at - r->slots[slot & (PL_X_SLOTS - 1)].srv_seq;
  to->rule = r->name;
  to->status = r->status;
  to->method_head = r->method_head;
  to->head_len = r->head_len;
  to->req_left = r->req_left;
  to->resp_left = r->resp_left;
  to->resp_bytes = r->resp_bytes;
  to->punt = r->punt;
  to->t0_ns = r->t0_ns;
  if (!h)
    return;
  KEEP_LOOP
  for (int i = 0; i < PL_X_VIEW_HEAD_BYTES / 8; i++)
    ((u64 *)to->head)[i] = ((u64 *)h->bytes)[i];
}
