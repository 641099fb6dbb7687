/* Carries what connect() knew to the accepted socket: storage of the client's socket, at TCP_CONNECT_CB (first to know
 * the source port) into `arriving`, at PASSIVE_ESTABLISHED into storage of the accepted socket. */

#define SOL_TCP 6
#define TCP_NODELAY 1
#define TCP_USER_TIMEOUT 18
#define GIVE_UP_MS 1000

/* What a paired socket sends the ordinary way goes to TCP page by page: a whole response becomes small segments, of which each
 * would wait for the acknowledgement of the one before, 40 ms (Nagle's algorithm against a delayed ACK). The peer is a proxy on
 * this node, to which small segments cost little. The application may ask for the delay again. */
static inline void no_delay(struct bpf_sock_ops *s)
{
  int on = 1;

  bpf_setsockopt(s, SOL_TCP, TCP_NODELAY, &on, sizeof(on));
}

static inline void local_of(struct bpf_sock_ops *s, struct pl_addr *a)
{
  u32 ip = s->local_ip4; /* read in any case: a choice between two context fields is no fixed offset */

  a->w[0] = s->local_ip6[0];
  a->w[1] = s->local_ip6[1];
  a->w[2] = s->local_ip6[2];
  a->w[3] = s->local_ip6[3];
  BARRIER;
  if (s->family == AF_INET)
    set_v4(a, ip);
}

static inline void remote_of(struct bpf_sock_ops *s, struct pl_addr *a)
{
  u32 ip = s->remote_ip4; /* read in any case: a choice between two context fields is no fixed offset */

  a->w[0] = s->remote_ip6[0];
  a->w[1] = s->remote_ip6[1];
  a->w[2] = s->remote_ip6[2];
  a->w[3] = s->remote_ip6[3];
  BARRIER;
  if (s->family == AF_INET)
    set_v4(a, ip);
}

/* client: this end opened the connection */
static inline void flow_of(struct bpf_sock_ops *s, bool client, struct pl_flow *f)
{
  struct pl_addr local, remote;

  local_of(s, &local);
  remote_of(s, &remote);
  if (client)
    set_flow(f, netns_cookie(s), &local, s->local_port, &remote, ntoh32(s->remote_port));
  else
    set_flow(f, netns_cookie(s), &remote, ntoh32(s->remote_port), &local, s->local_port);
}

/* The record and its place in its identity's quota come and go together */
static inline bool admit_flow(struct pl_flow *f, struct pl_arrival *a)
{
  struct pl_usage *u = usage_of(a->origin.identity);

  if (!u || arriving.insert(f, a) != 0) /* taken: a second connection can not have the tuple */
    return false;
  __sync_fetch_and_add(&u->arriving, 1);
  return true;
}

static inline void forget_record(struct pl_flow *f, u32 identity)
{
  struct pl_usage *u;

  if (arriving.delete(f) != 0) /* somebody else was first */
    return;
  u = usage.lookup(&identity);
  if (u)
    __sync_fetch_and_add(&u->arriving, -1);
}

static inline void forget_flow(struct pl_flow *f)
{
  struct pl_arrival *a = arriving.lookup(f);

  if (a)
    forget_record(f, a->origin.identity);
}

static inline void connecting(struct bpf_sock_ops *s, struct bpf_sock *sk)
{
  struct pl_conn *conn = conns.sk_storage_get(sk, 0, 0);
  struct pl_arrival a = {};
  struct pl_flow f = {};
  struct pl_caller *caller;
  struct pl_origin *o;
  struct pl_source *source;
  struct pl_addr shown;
  int give_up = GIVE_UP_MS;

  if (!conn || !conn->kind)
    return;
  a.kind = conn->kind;
  flow_of(s, true, &f);
  if (conn->kind == PL_ARRIVAL_PROXY) {
    caller = callers.sk_storage_get(sk, 0, 0);
    if (!caller)
      goto unrecorded;
    a.origin.client = caller->addr;
    a.origin.client_port = caller->port;
    a.origin.identity = caller->identity;
  } else if (conn->kind == PL_ARRIVAL_NATIVE || conn->kind == PL_ARRIVAL_LOCAL) {
    a.origin.client = f.src;
    a.origin.client_port = f.sport;
    a.origin.workload = conn->source;
    a.origin.identity = conn->identity;
    if (conn->kind == PL_ARRIVAL_NATIVE && conn->generation) /* connect.c asked what ingress.c would */
      a.agreed = (u64)conn->workload << 32 | conn->generation;
  } else if (conn->kind == PL_ARRIVAL_CAPTURED) {
    o = origins.sk_storage_get(sk, 0, 0);
    if (!o)
      goto unrecorded;
    shown = f.src;
    if (is_loopback(&shown)) { /* loopback is nobody's own address */
      source = sources.lookup(&o->workload);
      if (source) { /* of the same family, where the workload has one of it */
        bool four = is_zero(&source->v6) || (is_v4(&shown) && !is_zero(&source->v4));

        if (!is_zero(four ? &source->v4 : &source->v6))
          shown = four ? source->v4 : source->v6;
      }
    }
    o->client = shown;
    o->client_port = f.sport;
    a.origin = *o;
    no_delay(s);
  } else {
    return;
  }
  if (!admit_flow(&f, &a)) {
    forget_flow(&f); /* of a connection that ended unseen */
    if (!admit_flow(&f, &a))
      goto unrecorded;
  }
  bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
  return;
unrecorded:
  conn->flags |= PL_CONN_UNRECORDED; /* egress.c drops its SYN, and counts */
  conn->generation = 0;
  bpf_setsockopt(s, SOL_TCP, TCP_USER_TIMEOUT, &give_up, sizeof(give_up)); /* fail in a second, not in two minutes */
}

static inline void accepted(struct bpf_sock_ops *s, struct bpf_sock *sk)
{
  struct pl_conn conn = {}; /* generation 0: the next packet is evaluated, by who owns the socket */
  struct pl_flow f = {};
  struct pl_arrival *a;

  flow_of(s, false, &f);
  conn.port = f.dport;
  conn.proto = IPPROTO_TCP;
  conn.kind = PL_CONN_OUTSIDE;
  a = arriving.lookup(&f);
  if (a) {
    conn.kind = a->kind;
    conn.identity = a->origin.identity;
    conn.workload = conn.source = a->origin.workload;
    conn.generation = (u32)a->agreed; /* ingress.c, too, just let in what made this socket, to its listener's owner */
    if (a->kind == PL_ARRIVAL_CAPTURED)
      origins.sk_storage_get(sk, &a->origin, BPF_SK_STORAGE_GET_F_CREATE);
    if (a->kind == PL_ARRIVAL_PROXY) {
      conn.peer = a->origin.client;
      conn.peer_port = a->origin.client_port;
      no_delay(s);
    }
  }
  if (s->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG) /* its listener's */
    bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG);
  conn.flags = PL_CONN_SERVER;
  conns.sk_storage_get(sk, &conn, BPF_SK_STORAGE_GET_F_CREATE);
  if (a)
    forget_record(&f, conn.identity);
}

static inline void listening(struct bpf_sock_ops *s, struct bpf_sock *sk)
{
  /* a client's socket that was disconnected and listens now must not carry its old admission */
  struct pl_conn *conn = blank(sk);
  struct pl_member *owner;
  u64 cgroup;

  if (!conn)
    return;
  conn->netns = netns_cookie(s); /* an MPTCP listener has none yet */
  if (s->local_port != PL_PORT_OUTBOUND)
    return;
  cgroup = conn->cgroup;
  owner = members.lookup(&cgroup);
  if (!owner || owner->role != PL_ROLE_AGENT)
    return;
  conn->flags |= PL_CONN_LISTENER;
  bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* Agent and proxy are gone, both: before the port is free, nobody is led there any more */
static inline void listened(struct bpf_sock *sk)
{
  struct pl_conn *conn = conns.sk_storage_get(sk, 0, 0);
  u64 netns;

  if (!conn || !(conn->flags & PL_CONN_LISTENER))
    return;
  netns = conn->netns;
  listeners.delete(&netns);
}

/* A client's socket leaves a state: its record goes with its end. Mostly the server's socket has taken the record when the
 * first side closes, and then there is nothing more to hear of. */
static inline void moved_on(struct bpf_sock_ops *s, struct bpf_sock *sk)
{
  bool over = s->args[1] == TCP_STATE_CLOSE;
  struct pl_flow f = {};
  struct pl_conn *conn;

  if (s->args[0] == TCP_STATE_LISTEN) {
    listened(sk);
    return;
  }
  if (!over && s->args[0] != TCP_STATE_ESTABLISHED)
    return;
  conn = conns.sk_storage_get(sk, 0, 0);
  if (!conn || (conn->flags & PL_CONN_SERVER))
    return;
  flow_of(s, true, &f);
  if (over)
    forget_flow(&f);
  else if (!arriving.lookup(&f))
    bpf_sock_ops_cb_flags_set(s, s->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG);
}

int on_sockops(struct bpf_sock_ops *s)
{
  u32 op = s->op;
  struct bpf_sock *sk;

  /* The kernel asks for much that is not ours to answer */
  if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_TCP_LISTEN_CB &&
      op != BPF_SOCK_OPS_STATE_CB)
    return 1;
  sk = s->sk; /* read once: each read is a new maybe-null to the verifier */
  if (!sk)
    return 1;
  if (op == BPF_SOCK_OPS_TCP_CONNECT_CB)
    connecting(s, sk);
  else if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
    accepted(s, sk);
  else if (op == BPF_SOCK_OPS_TCP_LISTEN_CB)
    listening(s, sk);
  else
    moved_on(s, sk);
  return 1;
}
