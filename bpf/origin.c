/* The private socket option: the proxy asks an accepted socket where it was going (get), and says on its own socket
 * for whom it connects (set). Everybody else hears ENOPROTOOPT and EPERM. */

#define OPT_TCP_REPAIR 19
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
    if (ctx->optlen > PAGE_BYTES)
      ctx->optlen = 0;
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
