/* The private socket option: the proxy asks an accepted socket where it was going (get), and says on its own socket
 * for whom it connects (set). Everybody else hears ENOPROTOOPT and EPERM. */

#define SOL_SOCKET 1
#define OPT_RCVLOWAT 18
#define OPT_PEEK_OFF 42
#define OPT_ZEROCOPY 60
#define OPT_TCP_REPAIR 19
#define OPT_TCP_ULP 31
#define PAGE_BYTES 4096

static inline bool is_mesh(struct pl_config *c)
{
  struct pl_member *m;
  u64 cgroup;

  if (!c)
    return false;
  m = current_member(c, &cgroup);
  return m && (m->role == PL_ROLE_AGENT || m->role == PL_ROLE_PROXY);
}

static inline void get_express(struct bpf_sockopt *ctx, struct bpf_sock *sk)
{
  struct pl_xview *to = ctx->optval;
  void *end = ctx->optval_end;
  struct pl_xrecord *r;
  struct pl_xhead *h;
  u64 id;

  if ((void *)(to + 1) > end || !is_mesh(configuration()))
    return;
  r = paired(sk);
  if (!r)
    return;
  if (ctx->optname == PL_OPT_EXPRESS) {
    view(r, to);
  } else {
    id = r->id;
    h = xheads.lookup(&id);
    if (!h)
      return;
    KEEP_LOOP
    for (int i = 0; i < PL_X_HEAD_BYTES / 8; i++)
      ((u64 *)to)[i] = ((u64 *)h->bytes)[i];
  }
  ctx->optlen = PL_X_HEAD_BYTES; /* of both */
  BARRIER;
  ctx->retval = 0;
}

static inline bool set_express(struct bpf_sockopt *ctx, struct bpf_sock *sk)
{
  struct pl_xarm *from = ctx->optval, a;
  void *end = ctx->optval_end;
  struct pl_xrecord *r;

  if ((void *)(from + 1) > end)
    return false;
  a = *from;
  r = paired(sk);
  return r && arm(r, &a);
}

/* What redirected bytes can not keep: the application has its way, and its requests go through user space */
static inline void for_tcp_alone(struct bpf_sockopt *ctx)
{
  s32 *value = ctx->optval;
  void *end = ctx->optval_end;
  struct bpf_sock *sk = ctx->sk;
  bool harmless;

  if (!sk || (void *)(value + 1) > end)
    return;
  if (ctx->optname == OPT_RCVLOWAT)
    harmless = *value == 0 || *value == 1;
  else if (ctx->optname == OPT_PEEK_OFF)
    harmless = *value < 0;
  else
    harmless = ctx->optname != OPT_ZEROCOPY || *value == 0;
  if (!harmless)
    leave_express(sk);
}

int on_getsockopt(struct bpf_sockopt *ctx)
{
  struct pl_origin *to = ctx->optval, *o;
  void *end = ctx->optval_end;
  struct bpf_sock *sk = ctx->sk;

  if (ctx->level != PL_LEVEL) {
    if (ctx->optlen > PAGE_BYTES)
      ctx->optlen = 0; /* we saw only its first page: the kernel's own answer stands */
    return 1;
  }
  if (sk && (ctx->optname == PL_OPT_EXPRESS || ctx->optname == PL_OPT_EXPRESS_HEAD)) {
    get_express(ctx, sk);
    return 1;
  }
  if (ctx->optname != PL_OPT_ORIGIN || !sk || (void *)(to + 1) > end || !is_mesh(configuration()))
    return 1;
  o = origins.sk_storage_get(sk, 0, 0);
  if (!o)
    return 1;
  *to = *o;
  ctx->optlen = sizeof(struct pl_origin);
  BARRIER;
  ctx->retval = 0;
  return 1;
}

int on_setsockopt(struct bpf_sockopt *ctx)
{
  struct pl_caller *from = ctx->optval, caller;
  void *end = ctx->optval_end;
  struct bpf_sock *sk = ctx->sk;
  struct tale t = {};

  if (ctx->level != PL_LEVEL) {
    if (ctx->level == IPPROTO_TCP && ctx->optname == OPT_TCP_REPAIR && !is_mesh(configuration()))
      goto deny; /* it makes connections that no handshake made */
    if (ctx->level == SOL_SOCKET)
      for_tcp_alone(ctx);
    if (ctx->level == IPPROTO_TCP && ctx->optname == OPT_TCP_ULP && sk && xends.sk_storage_get(sk, 0, 0))
      goto deny; /* TLS keys and redirected bytes exclude each other; not every kernel refuses */
    if (ctx->optlen > PAGE_BYTES)
      ctx->optlen = 0;
    return 1;
  }
  if (ctx->optname == PL_OPT_EXPRESS && sk && is_mesh(configuration())) {
    if (!set_express(ctx, sk))
      return 0; /* no pair, or busy: the proxy's to know, nobody's offence */
    ctx->optlen = -1;
    return 1;
  }
  if (ctx->optname != PL_OPT_CALLER || !sk || (void *)(from + 1) > end || !is_mesh(configuration()))
    goto deny;
  caller = *from;
  caller.pad = 0;
  settle(&caller.addr); /* the unspecified address, of either family, is loopback by another name */
  if (is_loopback(&caller.addr) || !caller.port)
    goto deny; /* the most trusted address is never shown on somebody's behalf */
  if (sk->family == AF_INET && !is_v4(&caller.addr))
    goto deny;
  callers.sk_storage_delete(sk);
  if (!callers.sk_storage_get(sk, &caller, BPF_SK_STORAGE_GET_F_CREATE))
    goto deny;
  ctx->optlen = -1; /* answered: the kernel's handler is not asked */
  return 1;
deny:
  t.hook = PL_HOOK_SOCKOPT;
  tell(PL_R_SOCKET_OPTION, &t);
  return 0;
}
