/* bind(): the mesh's ports are the agent's alone. So nobody takes one first, or joins by SO_REUSEPORT. */

static inline int bind_verdict(struct bpf_sock_addr *ctx, u16 port)
{
  struct pl_config *c = configuration();
  struct pl_member *m = NULL;
  struct tale t = {};
  u64 cgroup;
  u32 reason;

  if (c)
    m = current_member(c, &cgroup);
  if (m && m->role == PL_ROLE_AGENT)
    return 1;
  if (!m) {
    reason = PL_R_UNKNOWN_CGROUP;
  } else {
    if (port != PL_PORT_OUTBOUND && port != PL_PORT_HBONE && port != PL_PORT_DNS)
      return 1;
    reason = PL_R_BIND_DENIED;
    t.identity = m->identity;
    t.workload = m->workload;
  }
  t.sport = port;
  t.proto = ctx->protocol;
  t.hook = PL_HOOK_BIND;
  tell(reason, &t);
  return 0;
}

int on_bind4(struct bpf_sock_addr *ctx)
{
  return bind_verdict(ctx, ntoh16((u16)ctx->user_port));
}

int on_bind6(struct bpf_sock_addr *ctx)
{
  return bind_verdict(ctx, ntoh16((u16)ctx->user_port));
}
