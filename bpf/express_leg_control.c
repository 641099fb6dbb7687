/* What the agent does to the two sockets of a leg (express_leg.h), in the same two steps as in express_control.c; and the
 * entry to all of its operations. */

/* Both are what they are said to be: the proxy's accepted or dialled socket, and the application's */
static inline u32 may_leg(struct pl_xop *o, struct bpf_sock *app, struct bpf_sock *proxy, void *tp)
{
  struct pl_conn *conn = conns.sk_storage_get(proxy, 0, 0);
  struct pl_origin *origin;
  struct pl_caller *caller;

  if (app->state != TCP_ESTABLISHED || proxy->state != TCP_ESTABLISHED)
    return PL_XQ_NOT_ESTABLISHED;
  if (!conn)
    return PL_XQ_NOT_THE_PROXYS;
  if (o->side == PL_X_CLIENT) {
    origin = origins.sk_storage_get(proxy, 0, 0);
    if (conn->kind != PL_ARRIVAL_CAPTURED || !(conn->flags & PL_CONN_SERVER) || !origin)
      return PL_XQ_NOT_THE_PROXYS;
    o->identity = origin->identity;
  } else {
    caller = callers.sk_storage_get(proxy, 0, 0);
    if (conn->kind != PL_ARRIVAL_PROXY || (conn->flags & PL_CONN_SERVER) || !caller)
      return PL_XQ_NOT_THE_PROXYS;
    o->identity = caller->identity;
    o->caller = caller->addr;
  }
  return may_enrol(app, o, tp);
}

/* NULL, and why in `result`. It is nobody's end until both are entered */
static inline struct pl_xend *enter_leg(struct bpf_sock *sk, u64 key, u32 *result)
{
  struct pl_xend *e = xends.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  struct pl_xrecord *r;

  *result = PL_XQ_NO_STORAGE;
  if (!e)
    return NULL;
  *result = PL_XQ_PAIRED;
  r = record_of(e);
  if (r && !r->off)
    return NULL;
  *(volatile u64 *)&e->record = 0;
  BARRIER;
  if (!e->key) {
    *result = PL_XQ_REFUSED; /* somebody else's sockmap has it, or it is closing */
    if (xsocks.update(&key, sk))
      return NULL;
    e->key = key;
  }
  return e;
}

static inline u32 enter_both(struct pl_xop *o, struct bpf_sock *app, struct bpf_sock *proxy)
{
  struct pl_xend *a, *p;
  u32 result;

  p = enter_leg(proxy, o->key - 1, &result); /* the agent gives odd ones */
  if (!p)
    return result;
  a = enter_leg(app, o->key, &result);
  if (!a)
    return result;
  p->peer = a->key;
  a->peer = p->key;
  p->side = PL_X_LEG_PROXY;
  a->side = PL_X_LEG_APP;
  BARRIER;
  *(volatile u64 *)&p->record = o->record;
  *(volatile u64 *)&a->record = o->record;
  return PL_XQ_OK;
}

/* `peer`: of the other end: all it ever wrote has come, and was read. In the midst of something "all read" may hold for a moment
 * only, and what comes in the next is moved. */
static inline u32 settle_leg(struct pl_xop *o, struct pl_xleg *l, struct bpf_sock *sk, void *tp, void *peer, u32 side)
{
  struct pl_xend *e = xends.sk_storage_get(sk, 0, 0);
  u32 rcv = TCP_U32(tp, O_RCV_NXT);
  u64 key;

  if (!e || !e->key || e->record != o->record)
    return PL_XQ_NO_RECORD;
  if (!e->settled) {
    if (may_be_reading(tp) || TCP_U32(tp, O_OWNED) || !all_read(tp) || rcv != TCP_U32(peer, O_WRITE_SEQ))
      return PL_XQ_NOT_YET;
    key = e->key;
    if (xreads.update(&key, sk))
      return PL_XQ_REFUSED;
    BARRIER;
    if (TCP_U32(tp, O_RCV_NXT) != rcv && TCP_U32(tp, O_QUEUE_LEN)) { /* as in settle_end() */
      xreads.delete(&key);
      return PL_XQ_NOT_YET;
    }
    *(volatile u32 *)&e->settled = 1;
    if (all_read(tp)) /* later its own sends alone tell, under its lock: what moves is in no queue for a moment */
      *(volatile u64 *)&l->ends[side & 1].clean = clean_at(rcv);
  }
  return PL_XQ_OK;
}

static inline u32 leg_of_both(struct pl_xop *o, struct pl_xleg *l, struct bpf_sock *app, struct bpf_sock *proxy)
{
  void *tp = to_tcp_sock(app), *other = to_tcp_sock(proxy);
  u32 result;

  if (!tp || !other)
    return PL_XQ_NO_APP_SOCKET;
  if (o->kind == PL_XK_LEG) {
    result = may_leg(o, app, proxy, tp);
    return result == PL_XQ_OK ? enter_both(o, app, proxy) : result;
  }
  result = settle_leg(o, l, proxy, other, tp, PL_X_LEG_PROXY);
  return result == PL_XQ_OK ? settle_leg(o, l, app, tp, other, PL_X_LEG_APP) : result;
}

static inline u32 leg(struct __sk_buff *skb, struct pl_xop *o)
{
  struct bpf_sock *app, *proxy;
  struct pl_xleg *l;
  u64 id = o->record;
  u32 result;

  l = xlegs.lookup(&id);
  if (!l)
    return PL_XQ_NO_RECORD;
  app = established(skb, o->family, &o->local, o->local_port, &o->remote, o->remote_port);
  if (!app)
    return PL_XQ_NO_APP_SOCKET;
  proxy = established(skb, o->family, &o->remote, o->remote_port, &o->local, o->local_port);
  if (!proxy) {
    release(app);
    return PL_XQ_NO_PROXY_SOCKET;
  }
  result = leg_of_both(o, l, app, proxy);
  release(proxy);
  release(app);
  return result;
}

int express_control(struct __sk_buff *skb)
{
  struct pl_xop *o = (void *)(long)skb->data;
  struct pl_xrecord *r;
  struct pl_xhead *h;
  u32 result, place;
  u64 id;

  if ((void *)(o + 1) > (void *)(long)skb->data_end)
    return PL_XQ_MALFORMED;
  if (o->side != PL_X_CLIENT && o->side != PL_X_SERVER)
    return PL_XQ_MALFORMED;
  if (o->kind == PL_XK_LEG || o->kind == PL_XK_SETTLE_LEG)
    return leg(skb, o);
  id = o->record;
  h = xheads.lookup(&id);
  if (!h)
    return PL_XQ_NO_RECORD;
  place = h->place;
  r = xrecords.lookup(&place);
  if (!r || r->id != id)
    return PL_XQ_NO_RECORD;
  if (o->kind == PL_XK_FORGET) {
    r->off = 1;
    load_less(r);
    return PL_XQ_OK;
  }
  if (o->kind == PL_XK_PROGRAM) {
    r->armed = 0; /* its slots may be other endpoints now: the proxy arms again */
    BARRIER;
    r->program = o->program;
    return PL_XQ_OK;
  }
  if (o->slot >= PL_X_SLOTS)
    return PL_XQ_MALFORMED;
  if (o->kind == PL_XK_SETTLE)
    return settle_end(skb, o, r);
  if (o->kind != PL_XK_ENROL && o->kind != PL_XK_CHECK)
    return PL_XQ_MALFORMED;
  result = proxy_end(skb, o, r);
  if (result != PL_XQ_OK || o->kind == PL_XK_CHECK)
    return result;
  return enrol(skb, o, r);
}
