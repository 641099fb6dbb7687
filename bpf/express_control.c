/* control(): what the agent does to applications' sockets it holds no descriptor of. Run by BPF_PROG_TEST_RUN from a thread
 * in the sockets' network namespace, with a struct pl_xop as the packet; returns enum pl_xresult.
 *
 * Entering a socket takes two steps. ENROL puts it into xsocks: its sends run express(), and every recv() that begins from
 * now on knows of redirected bytes. But one that sleeps already, in TCP's own recv(), would wait for TCP's own queue alone
 * for ever. So nothing is redirected, and TCP's bytes stay where that reader looks, until SETTLE has seen that there is
 * none: whoever sleeps on the socket holds a reference to its psock, as only the new recv() and send() do. */

#define WAITERS_MAX 16
#define TCP_ESTABLISHED 1

static struct bpf_sock *(*lookup_tcp)(void *ctx, void *tuple, u32 size, u64 netns, u64 flags) = (void *)84;
static long (*release)(void *sk) = (void *)86;

/* As a packet towards this end of the connection carries it */
static inline struct bpf_sock *established(struct __sk_buff *skb, u32 family, const struct pl_addr *from, u16 from_port,
                                           const struct pl_addr *to, u16 to_port)
{
  struct bpf_sock_tuple t = {};

  if (family == AF_INET) {
    t.ipv4.saddr = from->w[3];
    t.ipv4.daddr = to->w[3];
    t.ipv4.sport = hton16(from_port);
    t.ipv4.dport = hton16(to_port);
    return lookup_tcp(skb, &t, sizeof(t.ipv4), (u64)-1, 0);
  }
  t.ipv6.saddr[0] = from->w[0]; t.ipv6.saddr[1] = from->w[1]; t.ipv6.saddr[2] = from->w[2]; t.ipv6.saddr[3] = from->w[3];
  t.ipv6.daddr[0] = to->w[0]; t.ipv6.daddr[1] = to->w[1]; t.ipv6.daddr[2] = to->w[2]; t.ipv6.daddr[3] = to->w[3];
  t.ipv6.sport = hton16(from_port);
  t.ipv6.dport = hton16(to_port);
  return lookup_tcp(skb, &t, sizeof(t.ipv6), (u64)-1, 0);
}

/* Somebody may be inside TCP's own recv() of this socket, which xsocks alone has. Threads that poll are not; what can not be
 * told is taken for one. */
static inline bool may_be_reading(void *tp)
{
  u64 psock = *(volatile u64 *)(tp + O_USER_DATA) & ~7ull, queue, head, next = 0, func, private;
  u32 refs = 0, asleep = 0;

  if (TCP_U32(tp, O_OWNED) || !psock || read_kernel(&refs, 4, (void *)(psock + O_PSOCK_REFS)))
    return true;
  queue = *(volatile u64 *)(tp + O_WQ);
  if (!queue)
    return true; /* not accepted yet */
  head = queue + O_WQ_HEAD;
  if (read_kernel(&next, 8, (void *)head))
    return true;
  KEEP_LOOP
  for (int i = 0; i < WAITERS_MAX; i++) {
    if (next == head)
      return asleep > 1 || asleep + 1 > refs; /* two: the kernel tells one of them EAGAIN */
    func = private = 0;
    if (read_kernel(&func, 8, (void *)(next - O_WQE_ENTRY + O_WQE_FUNC)) ||
        read_kernel(&private, 8, (void *)(next - O_WQE_ENTRY + O_WQE_PRIVATE)))
      return true;
    if (WOKEN_WAKE ? func == WOKEN_WAKE : private != 0)
      asleep++;
    if (read_kernel(&next, 8, (void *)next))
      return true;
  }
  return true;
}

/* The proxy's end: its identity, and where it stands */
static inline u32 proxy_end(struct __sk_buff *skb, struct pl_xop *o, struct pl_xrecord *r)
{
  struct bpf_sock *sk = established(skb, o->family, &o->remote, o->remote_port, &o->local, o->local_port);
  struct pl_xslot *s = &r->slots[o->slot & (PL_X_SLOTS - 1)];
  u32 result = PL_XQ_OK, read, written, side;
  struct pl_xend *e;
  struct pl_caller *caller;
  struct pl_origin *origin;
  struct pl_conn *conn;
  u64 key;
  void *tp;

  if (!sk)
    return PL_XQ_NO_PROXY_SOCKET;
  if (sk->state != TCP_ESTABLISHED) {
    result = PL_XQ_NOT_ESTABLISHED;
    goto out;
  }
  tp = to_tcp_sock(sk);
  conn = conns.sk_storage_get(sk, 0, 0);
  if (!tp || !conn) {
    result = PL_XQ_NOT_THE_PROXYS;
    goto out;
  }
  read = TCP_U32(tp, O_COPIED_SEQ);
  written = TCP_U32(tp, O_WRITE_SEQ);
  if (o->side == PL_X_CLIENT) {
    origin = origins.sk_storage_get(sk, 0, 0);
    if (conn->kind != PL_ARRIVAL_CAPTURED || !(conn->flags & PL_CONN_SERVER) || !origin) {
      result = PL_XQ_NOT_THE_PROXYS;
      goto out;
    }
    if (origin->identity != o->identity) {
      result = PL_XQ_IDENTITY;
      goto out;
    }
  } else {
    caller = callers.sk_storage_get(sk, 0, 0);
    if (conn->kind != PL_ARRIVAL_PROXY || (conn->flags & PL_CONN_SERVER) || !caller) {
      result = PL_XQ_NOT_THE_PROXYS;
      goto out;
    }
    if (caller->identity != o->identity) {
      result = PL_XQ_IDENTITY;
      goto out;
    }
    /* the port is of whichever connection of the caller's it was dialled for */
    if (!same_addr(&caller->addr, &o->caller)) {
      result = PL_XQ_CALLER;
      goto out;
    }
  }
  if (o->kind == PL_XK_CHECK) { /* what waits unread there is for the next worker to read */
    e = xends.sk_storage_get(sk, 0, 0);
    if (!e || e->record != o->record)
      result = PL_XQ_NO_RECORD;
    else if (o->side == PL_X_CLIENT ? read != r->arm_up || written != r->arm_down : read != s->srv_seq || written != s->up_seq)
      result = PL_XQ_MOVED;
    goto out;
  }
  side = o->side == PL_X_CLIENT ? PL_X_ACCEPTED : PL_X_UPSTREAM;
  e = xends.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!e) {
    result = PL_XQ_NO_STORAGE;
    goto out;
  }
  if (e->key) { /* it is or was a leg's: what goes, or waits still, by a leg moves no sequence numbers, by which a pair is latched */
    result = PL_XQ_PAIRED;
    goto out;
  }
  *(volatile u64 *)&e->record = 0;
  BARRIER;
  e->side = side;
  e->slot = o->slot;
  *(volatile u32 *)&e->place = r->place;
  BARRIER;
  *(volatile u64 *)&e->record = o->record;
  if (o->side == PL_X_CLIENT) {
    r->base_in = read;
    r->base_out = written;
  } else {
    s->base_in = s->srv_seq = read;
    s->base_out = s->up_seq = written;
  }
out:
  release(sk);
  return result;
}

/* The application's end may become what the operation says */
static inline u32 may_enrol(struct bpf_sock *sk, struct pl_xop *o, void *tp)
{
  struct pl_conn *conn = conns.sk_storage_get(sk, 0, 0);
  struct pl_origin *origin;

  if (!conn)
    return PL_XQ_NOT_CAPTURED;
  if (o->side == PL_X_CLIENT) {
    origin = origins.sk_storage_get(sk, 0, 0);
    if (conn->kind != PL_ARRIVAL_CAPTURED || (conn->flags & PL_CONN_SERVER) || !origin)
      return PL_XQ_NOT_CAPTURED;
    if (origin->identity != o->identity || conn->identity != o->identity)
      return PL_XQ_IDENTITY;
  } else {
    if (conn->kind != PL_ARRIVAL_PROXY || !(conn->flags & PL_CONN_SERVER))
      return PL_XQ_NOT_CAPTURED;
    if (conn->identity != o->identity)
      return PL_XQ_IDENTITY;
    if (!same_addr(&conn->peer, &o->caller))
      return PL_XQ_CALLER;
  }
  if ((s32)TCP_U32(tp, O_LOWAT) > 1)
    return PL_XQ_LOWAT;
  if ((s32)TCP_U32(tp, O_PEEK_OFF) >= 0)
    return PL_XQ_PEEK_OFF;
  if (*(volatile u64 *)(tp + O_FLAGS) >> SOCK_ZEROCOPY & 1)
    return PL_XQ_ZEROCOPY; /* nobody tells the sender of what is redirected that he may have his pages again */
  if (*(volatile u64 *)(tp + O_ULP))
    return PL_XQ_ULP;
  return PL_XQ_OK;
}

/* Its former pair ends with the new one */
static inline void leave_former(struct pl_xend *e, u64 record)
{
  struct pl_xrecord *r = record_of(e);

  if (r && e->record != record)
    r->off = 1;
}

static inline u32 enrol(struct __sk_buff *skb, struct pl_xop *o, struct pl_xrecord *r)
{
  struct pl_xslot *s = &r->slots[o->slot & (PL_X_SLOTS - 1)];
  struct pl_xend *e;
  struct bpf_sock *sk;
  u32 result, rcv;
  u64 key;
  void *tp;

  sk = established(skb, o->family, &o->local, o->local_port, &o->remote, o->remote_port);
  if (!sk)
    return PL_XQ_NO_APP_SOCKET;
  if (sk->state != TCP_ESTABLISHED) {
    result = PL_XQ_NOT_ESTABLISHED;
    goto out;
  }
  tp = to_tcp_sock(sk);
  if (!tp) {
    result = PL_XQ_NO_APP_SOCKET;
    goto out;
  }
  result = may_enrol(sk, o, tp);
  if (result != PL_XQ_OK)
    goto out;
  e = xends.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
  if (!e) {
    result = PL_XQ_NO_STORAGE;
    goto out;
  }
  leave_former(e, o->record);
  rcv = TCP_U32(tp, O_RCV_NXT);
  *(volatile u64 *)&e->record = 0;
  BARRIER;
  if (!e->key) {
    key = o->key;
    if (xsocks.update(&key, sk)) {
      result = PL_XQ_REFUSED; /* somebody else's sockmap has it, or it is closing */
      goto out;
    }
    e->key = key;
  }
  key = o->key = e->key;
  e->side = o->side;
  e->slot = o->slot;
  *(volatile u32 *)&e->place = r->place;
  BARRIER;
  *(volatile u64 *)&e->record = o->record;
  if (o->side == PL_X_CLIENT) {
    r->refs = 0;
    *(volatile u64 *)&e->saved = 0;
    *(volatile u64 *)&r->client_key = key;
  } else {
    s->workload = o->workload;
    s->port = o->port;
    s->dirty = 0;
    s->clean = e->settled && all_read(tp) ? clean_at(rcv) : 0;
    BARRIER;
    *(volatile u64 *)&s->key = key;
  }
out:
  release(sk);
  return result;
}

/* Whether the proxy has written nothing that this end has not read: by the last arm, or from the pairing on while there was
 * none. In the midst of an answer "all read" may hold for a moment only, and what comes in the next is moved. */
static inline bool at_rest(struct pl_xop *o, struct pl_xrecord *r, struct pl_xslot *s, void *tp)
{
  u32 rcv = TCP_U32(tp, O_RCV_NXT), armed = *(volatile u32 *)&r->armed;

  if (o->side == PL_X_SERVER)
    return rcv == (armed ? s->up_seq : s->base_out);
  return rcv == (armed ? r->arm_down : r->base_out);
}

static inline u32 settle_end(struct __sk_buff *skb, struct pl_xop *o, struct pl_xrecord *r)
{
  struct pl_xslot *s = &r->slots[o->slot & (PL_X_SLOTS - 1)];
  struct bpf_sock *sk;
  struct pl_xend *e;
  u32 result, rcv;
  void *tp;
  u64 key;

  sk = established(skb, o->family, &o->local, o->local_port, &o->remote, o->remote_port);
  if (!sk)
    return PL_XQ_NO_APP_SOCKET;
  tp = to_tcp_sock(sk);
  e = xends.sk_storage_get(sk, 0, 0);
  if (!tp || !e || !e->key || e->record != o->record) {
    result = PL_XQ_NO_RECORD;
    goto out;
  }
  rcv = TCP_U32(tp, O_RCV_NXT);
  if (!e->settled) {
    /* A segment moves from TCP's queue as a whole: what was read of it already would be read again */
    if (may_be_reading(tp) || TCP_U32(tp, O_OWNED) || !all_read(tp) || !at_rest(o, r, s, tp)) {
      result = PL_XQ_NOT_YET;
      goto out;
    }
    key = e->key;
    if (xreads.update(&key, sk)) {
      result = PL_XQ_REFUSED;
      goto out;
    }
    BARRIER;
    /* What came in between waits where it was put, and may be half read before the next segment moves it */
    if (TCP_U32(tp, O_RCV_NXT) != rcv && TCP_U32(tp, O_QUEUE_LEN)) {
      xreads.delete(&key);
      result = PL_XQ_NOT_YET;
      goto out;
    }
    *(volatile u32 *)&e->settled = 1;
  }
  if (o->side == PL_X_SERVER && s->key == e->key && all_read(tp))
    *(volatile u64 *)&s->clean = clean_at(rcv);
  result = PL_XQ_OK;
out:
  release(sk);
  return result;
}
